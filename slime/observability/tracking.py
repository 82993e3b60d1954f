"""Recording of metrics: `metrics.jsonl` in the run directory always, other sinks where asked for.

A line of `metrics.jsonl`:

    {"time": 1767225600.0, "axis": "train/step", "step": 12, "metrics": {"train/loss": 0.31, ...}}

A step may be logged in several lines; their keys are merged, the last value wins. Each start of the driver opens a
session with a line of axis "session". A session takes over an axis from the first step it logs there: what earlier
sessions logged at that step and later is superseded (it stays in the file; `read_metrics` leaves it out).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slime.observability.jsonl import JsonlWriter, read_jsonl
from slime.observability.sinks import AXES, Axis, Sink, TrackingConfig, open_sinks

METRICS_FILE = "metrics.jsonl"
_SESSION = "session"
logger = logging.getLogger(__name__)


class Tracker:
    """Sends metrics to `metrics.jsonl` and the sinks. One per run, in the driver.

    A sink that fails is named in one warning and the run goes on; `metrics.jsonl` that cannot be written is an OSError.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        start_rollout_id: int = 0,
        sinks: Sequence[Sink] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._sinks = tuple(sinks)
        self._num_missed: defaultdict[str, int] = defaultdict(int)
        self._writer = JsonlWriter(run_dir / METRICS_FILE)
        self._write(_SESSION, start_rollout_id, {"start_rollout_id": start_rollout_id})

    def log(self, axis: Axis, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` at `step` of `axis`; values are anything `float()` takes, NaN and infinities included."""
        if axis not in AXES:
            raise ValueError(f"axis must be one of {', '.join(AXES)}, got {axis!r}")
        values = {key: float(value) for key, value in metrics.items()}
        self._write(axis, step, values)
        for sink in self._sinks:
            try:
                sink.log(axis, step, values)
            except sink.failures as error:
                self._miss(sink, error)

    def close(self) -> None:
        """Close every sink; tells what they missed."""
        self._writer.close()
        for sink in self._sinks:
            try:
                sink.close()
            except sink.failures as error:
                self._miss(sink, error)
            if self._num_missed[sink.name]:
                logger.warning("%s missed %d updates", sink.name, self._num_missed[sink.name])

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _write(self, axis: str, step: int, values: dict[str, float]) -> None:
        self._writer.append({"time": self._clock(), "axis": axis, "step": step, "metrics": values})

    def _miss(self, sink: Sink, error: Exception) -> None:
        if not self._num_missed[sink.name]:
            logger.warning("%s fails, the run goes on without it: %s", sink.name, error)
        self._num_missed[sink.name] += 1


def open_tracker(
    config: TrackingConfig,
    run_dir: Path,
    *,
    start_rollout_id: int,
    arguments: Mapping[str, Any],
) -> Tracker:
    """A tracker with the sinks of `config`; `arguments` are the run's flags, recorded where a sink can show them."""
    sinks = open_sinks(config, run_dir, arguments)
    return Tracker(run_dir, start_rollout_id=start_rollout_id, sinks=sinks)


class Series(NamedTuple):
    """One metric by ascending step. `times` are unix seconds."""

    steps: list[int]
    values: list[float]
    times: list[float]


AxisSeries = dict[str, Series]  # by metric key


def read_metrics(run_dir: Path) -> dict[str, AxisSeries]:
    """What a run has recorded so far: `{axis: {key: Series}}`, superseded lines left out.

    The axis "session" holds `start_rollout_id` of each start of the driver. An unfinished last line is ignored.
    Raises FileNotFoundError where the directory holds no `metrics.jsonl`, ValueError on a line that is none of ours.
    """
    path = run_dir / METRICS_FILE
    steps: defaultdict[str, dict[int, dict[str, tuple[float, float]]]] = defaultdict(
        dict
    )  # axis: step: key: value, time
    taken_over: set[str] = set(AXES)  # axes in which this session has logged
    num_sessions = 0
    for number, record in enumerate(read_jsonl(path), start=1):
        try:
            axis, step, now = record["axis"], record["step"], record["time"]
            values = {key: (float(value), now) for key, value in record["metrics"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of metrics ({error!r})") from error
        if axis == _SESSION:
            taken_over.clear()
            step = num_sessions
            num_sessions += 1
        elif axis not in taken_over:
            taken_over.add(axis)
            steps[axis] = {earlier: entry for earlier, entry in steps[axis].items() if earlier < step}
        steps[axis].setdefault(step, {}).update(values)
    return {axis: _by_key(by_step) for axis, by_step in steps.items()}


def _by_key(by_step: Mapping[int, Mapping[str, tuple[float, float]]]) -> AxisSeries:
    series: AxisSeries = {}
    for step in sorted(by_step):
        for key, (value, now) in by_step[step].items():
            entry = series.setdefault(key, Series([], [], []))
            entry.steps.append(step)
            entry.values.append(value)
            entry.times.append(now)
    return series
