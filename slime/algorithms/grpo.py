"""GRPO (arXiv:2402.03300): the advantage of a response is its reward relative to the other responses to its prompt.

Groups are named by id, so they may have any size and stand in any order. Without the division by the group's standard
deviation it is Dr. GRPO (`dr_grpo`); with the mean of the others as baseline it is RLOO (`rloo`).
"""

from __future__ import annotations

from torch import Tensor

from slime.algorithms.groups import centered, group_sizes, group_sums

STD_EPSILON = 1e-6


def advantages(rewards_S: Tensor, group_ids_S: Tensor, *, std_normalize: bool) -> Tensor:
    """Rewards minus the group mean, optionally over the group std (arXiv:2402.03300, section 4.1.2).

    rewards_S: [S] float. group_ids_S: [S], equal for the samples of one prompt.
    std_normalize: divide by the unbiased standard deviation of the group, plus 1e-6.
    Returns [S]. A constant group, and a group of one, give zeros.
    """
    centered_S = centered(rewards_S, group_ids_S)
    if not std_normalize:
        return centered_S
    degrees_S = (group_sizes(rewards_S, group_ids_S) - 1).clamp(min=1)
    variance_S = group_sums(centered_S**2, group_ids_S) / degrees_S
    return centered_S / (variance_S.sqrt() + STD_EPSILON)
