"""What a --dynamic-sampling-filter-path returns, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class DynamicFilterOutput:
    """keep: whether the group is trained on. reason: why not, a short word for the metrics.

    keep_when_insufficient: keep it all the same where further prompts would have to be drawn for it.
    """

    keep: bool
    reason: str | None = None
    keep_when_insufficient: bool = False


def call_dynamic_filter(fn: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> DynamicFilterOutput:
    """`fn(*args, **kwargs)`, a bool or a number that is one taken for `keep`; without a filter every group is kept.

    args: (args, samples). Raises ValueError for any other answer.
    """
    if fn is None:
        return DynamicFilterOutput(keep=True)
    output = fn(*args, **kwargs)
    if isinstance(output, DynamicFilterOutput):
        return output
    if output in (True, False):
        return DynamicFilterOutput(keep=bool(output))
    name = getattr(fn, "__qualname__", repr(fn))
    raise ValueError(
        f"the dynamic sampling filter {name} must return DynamicFilterOutput or a bool, got {output!r:.80}"
    )


def should_drop_dynamic_filter_output(output: DynamicFilterOutput, *, is_insufficient: bool) -> bool:
    """Whether the group is dropped. is_insufficient: what is kept and in flight does not fill the rollout without."""
    return not output.keep and not (output.keep_when_insufficient and is_insufficient)


class MetricGatherer:
    """Counts dropped groups by reason."""

    def __init__(self) -> None:
        self.drops: Counter[str] = Counter()

    def on_dynamic_filter_drop(self, reason: str | None) -> None:
        """Count one."""
        self.drops[reason or "unspecified"] += 1

    def collect(self) -> dict[str, float]:
        """`rollout/dynamic_filter/drop_{reason}`."""
        return {f"rollout/dynamic_filter/drop_{reason}": float(count) for reason, count in self.drops.items()}
