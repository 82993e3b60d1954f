"""What a reward is, and the error of one that could not be had."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

from slime.utils.types import Sample

Reward = float | dict[str, Any]


class RewardError(ValueError):
    """The reward of one sample could not be computed; the run may go on without this sample."""

    def __init__(self, function: str, sample_index: int | None, reason: str) -> None:
        super().__init__(f"reward {function}, sample {sample_index}: {reason}")
        self.function = function
        self.sample_index = sample_index
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self.sample_index, self.reason)


def checked_reward(reward: Any, function: str, sample: Sample) -> Reward:
    """`reward` as a float, or the dict it is, if its numbers are finite.

    Any scalar that knows its float value is taken (numpy, torch, bool). A dict may hold more than numbers, such as the
    parsed answer. Raises RewardError otherwise.
    """
    if _is_plain_and_finite(reward):
        return float(reward)
    if not isinstance(reward, dict):
        return _checked_number(reward, function, sample)
    if not reward:
        raise RewardError(function, sample.index, "returned an empty dict")
    for key, value in reward.items():
        if not _is_plain_and_finite(value) and isinstance(value, SupportsFloat):
            _checked_number(value, f"{function}[{key!r}]", sample)
    return reward


def _is_plain_and_finite(value: Any) -> bool:
    """The usual case: a check against a Protocol takes ten times as long as a cheap rule."""
    return type(value) in (float, int, bool) and math.isfinite(value)


def _checked_number(value: Any, function: str, sample: Sample) -> float:
    if not isinstance(value, SupportsFloat):
        raise RewardError(function, sample.index, f"returned {value!r:.80}, not a number or a dict of numbers")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # an array or a tensor of several entries
        raise RewardError(function, sample.index, f"returned {value!r:.80}, not one number ({error})") from error
    if not math.isfinite(number):
        raise RewardError(function, sample.index, f"returned {number}")
    return number


def required_label(function: str, sample: Sample) -> str:
    """The sample's label. Raises RewardError where it has none."""
    if sample.label is None:
        raise RewardError(function, sample.index, "the sample has no label. Name its key with --label-key.")
    return sample.label
