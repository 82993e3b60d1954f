"""RLOO (arXiv:2402.14740): REINFORCE whose baseline is the mean reward of the other responses to the prompt.

The baseline does not contain the sample itself, so the gradient is unbiased; GRPO's group mean does contain it, which
shrinks the advantage by (G - 1) / G.
"""

from __future__ import annotations

from torch import Tensor

from slime.algorithms.groups import centered, group_sizes


def advantages(rewards_S: Tensor, group_ids_S: Tensor) -> Tensor:
    """Rewards minus the mean of the other samples of the group: G / (G - 1) times reward minus group mean.

    rewards_S: [S] float. group_ids_S: [S], equal for the samples of one prompt.
    Returns [S]. A constant group gives zeros; so does a group of one, which has no others.
    """
    size_S = group_sizes(rewards_S, group_ids_S)
    return centered(rewards_S, group_ids_S) * size_S / (size_S - 1).clamp(min=1)
