"""What a run directory holds, as the report needs it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.observability.metrics import eval_names
from slime.observability.timer import PhaseRecord, read_phases
from slime.observability.tracking import METRICS_FILE, AxisSeries, Series, read_metrics
from slime.observability.trajectories import read_samples

ARGUMENTS_FILE = "args.yaml"
EMPTY = Series([], [], [])
_SECRET = re.compile(
    r"^(\s*[\w-]*(?:wandb[_-]key|api[_-]key|auth[_-]token|secret|password))\s*:\s*(?!null\b|~).+$", re.M
)


@dataclass(frozen=True)
class Run:
    """One run. `arguments` is the text of `args.yaml`, None where there is none."""

    name: str
    metrics: dict[str, AxisSeries]  # by axis, then key
    phases: list[PhaseRecord]
    samples: dict[int, list[dict[str, Any]]]  # by rollout id
    arguments: str | None

    def series(self, axis: str, key: str) -> Series:
        """The metric, empty where it was not recorded."""
        return self.metrics.get(axis, {}).get(key, EMPTY)

    @property
    def reward(self) -> Series:
        return self.series("rollout/step", "rollout/raw_reward")

    @property
    def evals(self) -> dict[str, Series]:
        """Mean reward of each evaluation data set, by name."""
        return {
            name: self.series("eval/step", f"eval/{name}") for name in eval_names(self.metrics.get("eval/step", {}))
        }

    @property
    def num_rollouts(self) -> int:
        """Rollouts that are done."""
        return max((series.steps[-1] + 1 for series in self.metrics.get("rollout/step", {}).values()), default=0)

    @property
    def start_times(self) -> list[float]:
        """Unix seconds of each start of the driver."""
        return self.series("session", "start_rollout_id").times

    @property
    def wall_s(self) -> float:
        """Seconds from each start to what was last recorded before the next."""
        stamps = sorted(time for axis in self.metrics.values() for series in axis.values() for time in series.times)
        starts = self.start_times or stamps[:1]
        ends = [*starts[1:], math.inf]
        return sum(
            max((stamp for stamp in stamps if start <= stamp < end), default=start) - start
            for start, end in zip(starts, ends, strict=True)
        )


def read_run(run_dir: Path) -> Run:
    """Read a run directory. Raises ValueError where it is none."""
    if not (run_dir / METRICS_FILE).is_file():
        problem = f"holds no {METRICS_FILE}" if run_dir.is_dir() else "is no directory"
        raise ValueError(f"{run_dir} is no run: it {problem}. Give the directory of a run (--run-dir, else --save).")
    arguments = run_dir / ARGUMENTS_FILE
    run = Run(
        name=run_dir.resolve().name,
        metrics=read_metrics(run_dir),
        phases=read_phases(run_dir),
        samples=read_samples(run_dir),
        arguments=_without_secrets(arguments.read_text(encoding="utf-8")) if arguments.is_file() else None,
    )
    for rollout_id in [rollout_id for rollout_id in run.samples if rollout_id >= max(1, run.num_rollouts)]:
        del run.samples[rollout_id]  # left by an earlier session that came further
    return run


def finite(values: Sequence[float]) -> list[float]:
    """The values that are neither NaN nor infinite."""
    return [value for value in values if math.isfinite(value)]


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window - 1` before it, those that are finite; NaN where none is."""
    means = []
    for end in range(1, len(values) + 1):
        present = finite(values[max(0, end - window) : end])
        means.append(sum(present) / len(present) if present else math.nan)
    return means


def smoothing_window(num_values: int) -> int:
    """How many values to average over: a fifteenth of them, one (no smoothing) for short runs."""
    return num_values // 15 if num_values >= 45 else (3 if num_values >= 12 else 1)


def short(value: float) -> str:
    """A number in about three digits: 0.412, 4.66, 38.2, 1,840, 52.3k, 1.2e-6."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if 0 < size < 0.001:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    if size < 100:
        return f"{value:.{3 if size < 1 else 2 if size < 10 else 1}f}".rstrip("0").rstrip(".") or "0"
    if size < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1000:.1f}k" if size < 1_000_000 else f"{value / 1_000_000:.2f}M"


def duration(seconds: float) -> str:
    """`8.4 -> "8.4 s"`, `95 -> "1 min 35 s"`, `3700 -> "1 h 2 min"`."""
    if seconds < 60:
        return f"{short(seconds)} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def _without_secrets(text: str) -> str:
    return _SECRET.sub(r"\1: (not shown)", text)
