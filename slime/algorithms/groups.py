"""What a sample's group says of it. Shapes: S samples; a result holds at each sample the value of its group."""

from __future__ import annotations

import torch
from torch import Tensor


def group_sums(values_S: Tensor, group_ids_S: Tensor) -> Tensor:
    """[S] the sum of `values_S` over each sample's group.

    group_ids_S: [S] integers, equal for the samples of one prompt, in any order.
    """
    index_S, empty_G = _groups(values_S, group_ids_S)
    return empty_G.index_add(0, index_S, values_S)[index_S]


def group_sizes(values_S: Tensor, group_ids_S: Tensor) -> Tensor:
    """[S] how many samples each sample's group has, in the type of `values_S`."""
    return group_sums(torch.ones_like(values_S), group_ids_S)


def is_constant(values_S: Tensor, group_ids_S: Tensor) -> Tensor:
    """[S] bool, whether all samples of each sample's group have one value."""
    index_S, empty_G = _groups(values_S, group_ids_S)
    highest_G = empty_G.scatter_reduce(0, index_S, values_S, "amax", include_self=False)
    lowest_G = empty_G.scatter_reduce(0, index_S, values_S, "amin", include_self=False)
    return (highest_G == lowest_G)[index_S]


def centered(values_S: Tensor, group_ids_S: Tensor) -> Tensor:
    """[S] values minus the mean of their group; exactly 0 in a constant group, and so in a group of one.

    Rounding of the mean would leave crumbs in a constant group, which a division by a tiny std blows up.
    """
    mean_S = group_sums(values_S, group_ids_S) / group_sizes(values_S, group_ids_S)
    return torch.where(is_constant(values_S, group_ids_S), torch.zeros_like(values_S), values_S - mean_S)


def _groups(values_S: Tensor, group_ids_S: Tensor) -> tuple[Tensor, Tensor]:
    """[S] the place of each sample's group, and zeros of one entry a group."""
    _, index_S = torch.unique(group_ids_S, return_inverse=True)
    num_groups = int(index_S.max()) + 1 if len(index_S) else 0
    return index_S, torch.zeros(num_groups, dtype=values_S.dtype, device=values_S.device)
