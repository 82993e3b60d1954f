"""GRPO (arXiv:2402.03300): the advantage of a response is its reward relative to the other responses to its prompt.

Groups are named by id, so they may have any size and stand in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPSILON = 1e-6


def advantages(rewards_S: Tensor, group_ids_S: Tensor, *, std_normalize: bool) -> Tensor:
    """Rewards minus the group mean, optionally over the group std (arXiv:2402.03300, section 4.1.2).

    rewards_S: [S] float. group_ids_S: [S], equal for the samples of one prompt.
    std_normalize: divide by the unbiased standard deviation of the group, plus 1e-6.
    Returns [S]. A constant group, and a group of one, give zeros.
    """
    _, group_S = torch.unique(group_ids_S, return_inverse=True)
    num_groups = int(group_S.max()) + 1 if len(group_S) else 0
    count = torch.bincount(group_S, minlength=num_groups).to(rewards_S.dtype)
    centered_S = rewards_S - _group_sum(rewards_S, group_S, num_groups)[group_S] / count[group_S]
    # Rounding leaves crumbs in a constant group, which the division by a tiny std would blow up.
    is_constant = _group_is_constant(rewards_S, group_S, num_groups)
    centered_S = torch.where(is_constant[group_S], torch.zeros_like(centered_S), centered_S)
    if not std_normalize:
        return centered_S
    variance = _group_sum(centered_S**2, group_S, num_groups) / (count - 1).clamp(min=1)
    return centered_S / (variance.sqrt()[group_S] + STD_EPSILON)


def _group_sum(values_S: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
    return torch.zeros(num_groups, dtype=values_S.dtype, device=values_S.device).index_add(0, group_S, values_S)


def _group_is_constant(values_S: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
    empty = torch.zeros(num_groups, dtype=values_S.dtype, device=values_S.device)
    highest = empty.scatter_reduce(0, group_S, values_S, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group_S, values_S, "amin", include_self=False)
    return highest == lowest
