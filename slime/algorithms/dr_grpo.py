"""Dr. GRPO (arXiv:2503.20783): GRPO without its two biases.

The advantage is not divided by the group's std, which favours prompts that are nearly solved or nearly hopeless, and
the loss is not divided by the length of its response, which favours long wrong answers (`reduce.constant_weights`).
"""

from __future__ import annotations

from torch import Tensor

from slime.algorithms.groups import centered


def advantages(rewards_S: Tensor, group_ids_S: Tensor) -> Tensor:
    """Rewards minus the group mean (arXiv:2503.20783, section 3.2).

    rewards_S: [S] float. group_ids_S: [S], equal for the samples of one prompt.
    Returns [S]. A constant group, and a group of one, give zeros.
    """
    return centered(rewards_S, group_ids_S)
