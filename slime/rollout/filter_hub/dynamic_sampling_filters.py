"""Filters for --dynamic-sampling-filter-path."""

from __future__ import annotations

from typing import Any

from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.utils.types import Sample

LEAST_STD = 1e-6  # rewards are float32 in training: what is closer makes no advantage


def check_reward_nonzero_std(args: Any, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Drops a group whose rewards are all the same: its advantages are zero (DAPO, arXiv:2503.14476, section 3.2).

    The reason is `zero_std_{reward}`, to one decimal.
    """
    rewards = [sample.get_reward_value(args) for sample in samples]
    if max(rewards) - min(rewards) > LEAST_STD:
        return DynamicFilterOutput(keep=True)
    return DynamicFilterOutput(keep=False, reason=f"zero_std_{round(rewards[0], 1)}")
