"""How long each phase of a step took: `perf/{phase}_time` metrics and `phases.jsonl`, the stamps of a waterfall.

with timer.phase("train"):
    with timer.phase("log_probs"):   # its seconds count in both
        ...
tracker.log("rollout/step", rollout_id, timer.collect())
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from slime.observability.jsonl import JsonlWriter, read_jsonl

PHASES_FILE = "phases.jsonl"
logger = logging.getLogger(__name__)


class PhaseRecord(NamedTuple):
    """One phase: `start` and `end` in unix seconds, `process` names who spent them ("driver", "trainer 0").

    session: unix seconds at which that process began to time, by which a resumed run is told from its earlier part.
    """

    rollout_id: int
    phase: str
    start: float
    end: float
    process: str
    session: float


class PhaseTimer:
    """Times the phases of one process. `rollout_id` is the step that phases belong to: the loop sets it.

    run_dir: where `phases.jsonl` is written (processes share it); None writes none.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        process: str,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rollout_id = 0
        self._process = process
        self._monotonic = monotonic
        self._session = wall()
        self._wall_offset = self._session - monotonic()  # one anchor: a change of the clock moves no phase
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._writer = JsonlWriter(run_dir / PHASES_FILE) if run_dir is not None else None
        self._has_warned = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block, also where it raises."""
        rollout_id, start = self.rollout_id, self._monotonic()
        try:
            yield
        finally:
            end = self._monotonic()
            self._seconds[name] += end - start
            stamps = start + self._wall_offset, end + self._wall_offset
            self._write(PhaseRecord(rollout_id, name, *stamps, self._process, self._session))

    def collect(self) -> dict[str, float]:
        """`perf/{phase}_time`: seconds by phase since the last call, added up over repetitions.

        With both a "train" and a "train_wait" phase, `perf/wait_time_ratio` is the share of their time spent waiting.
        """
        seconds, self._seconds = self._seconds, defaultdict(float)
        metrics = {f"perf/{name}_time": value for name, value in seconds.items()}
        if "train" in seconds and "train_wait" in seconds:
            metrics["perf/wait_time_ratio"] = seconds["train_wait"] / (seconds["train"] + seconds["train_wait"])
        return metrics

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, record: PhaseRecord) -> None:
        if self._writer is None:
            return
        try:
            self._writer.append(record._asdict())
        except OSError as error:
            if not self._has_warned:
                logger.warning("phase times are not recorded: %s", error)
                self._has_warned = True


def read_phases(run_dir: Path) -> list[PhaseRecord]:
    """The phases of a run by start time; none where nothing was recorded.

    Where a resumed run did rollouts again, only the last pass counts, process by process.
    """
    path = run_dir / PHASES_FILE
    if not path.exists():
        return []
    first_rollout: dict[tuple[str, float], int] = {}  # by process and session
    records = [PhaseRecord(**record) for record in read_jsonl(path)]
    for record in records:
        key = record.process, record.session
        first_rollout[key] = min(record.rollout_id, first_rollout.get(key, record.rollout_id))

    def is_done_again(record: PhaseRecord) -> bool:
        return any(
            process == record.process and session > record.session and rollout_id <= record.rollout_id
            for (process, session), rollout_id in first_rollout.items()
        )

    return sorted((record for record in records if not is_done_again(record)), key=lambda record: record.start)
