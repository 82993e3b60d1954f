"""What the driver records: phases on the display and in the waterfall, metrics in the tracker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slime.arguments import Args
from slime.observability.progress import Progress
from slime.observability.timer import PhaseTimer
from slime.observability.tracking import open_tracker
from slime.ray.ci_checks import Checks


class Journal:
    """Owns the timer and the tracker of a run, writes to its display; a context manager. settings: for the tracker."""

    def __init__(
        self, args: Args, run_dir: Path, progress: Progress, *, settings: dict[str, Any], start_rollout_id: int
    ) -> None:
        self.timer = PhaseTimer(run_dir, process="driver")
        self.timer.rollout_id = start_rollout_id
        self.tracker = open_tracker(args, run_dir, start_rollout_id=start_rollout_id, arguments=settings)
        self.checks = Checks(args) if args.ci_test else None
        self.progress = progress
        self.rollout_metrics: dict[str, float] = {}
        self.train_metrics: dict[str, float] = {}
        self._step_start = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.tracker.close()
        self.timer.close()

    @contextmanager
    def phase(self, name: str, waiting_for: str) -> Iterator[None]:
        """Time a block and show what is waited for."""
        with self.timer.phase(name), self.progress.phase(name, waiting_for):
            yield

    def evaluated(self, num_trained: int, metrics: dict[str, float]) -> None:
        """Metrics of an evaluation after `num_trained` rollouts."""
        self.tracker.log("eval/step", num_trained, metrics)
        self.progress.note(metrics)
        if self.checks is not None:
            self.checks.note(metrics)

    def begin_step(self) -> None:
        """From here on time counts for the next rollout: not what went before the first one."""
        self.timer.collect()
        self._step_start = time.monotonic()
        self.progress.begin_step()

    def end_step(self, rollout_id: int) -> None:
        """Write down the rollout that just ended."""
        perf = self.timer.collect() | {"perf/step_time": time.monotonic() - self._step_start}
        self.tracker.log("rollout/step", rollout_id, self.rollout_metrics | perf)
        self.tracker.log("train/step", rollout_id, self.train_metrics)
        metrics = self.rollout_metrics | self.train_metrics | perf
        self.progress.update(rollout_id, metrics)
        if self.checks is not None:
            self.checks.step(rollout_id, metrics)
        self.rollout_metrics, self.train_metrics = {}, {}
        self.timer.rollout_id = rollout_id + 1

    def end_run(self) -> None:
        """All rollouts are done. Raises CheckFailed where --ci-metric-checker-threshold was not reached."""
        if self.checks is not None:
            self.checks.end()
