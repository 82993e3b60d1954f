"""Discounted sums from each trained token to the end of its sequence, all sequences and tokens at once.

Shapes: T response tokens, sequences end to end; N of them trained. A masked token is no step of the chain: what follows
a tool's output is the next step after what preceded it, with one discount between the two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chain(NamedTuple):
    """The trained tokens in order: [1 0 1 | 0 1] in two sequences gives index_N = [0 2 4], has_next_N = [1 0 0]."""

    index_N: Tensor  # int64 [N], their places among the T tokens
    has_next_N: Tensor  # bool [N], whether another trained token of the same sequence follows


def trained_chain(mask_T: Tensor, sequence_ids_T: Tensor) -> Chain:
    """The chain of the tokens where `mask_T` is not 0. mask_T: [T]. sequence_ids_T: [T], sorted."""
    index_N = torch.nonzero(mask_T).squeeze(-1)
    sequence_N = sequence_ids_T[index_N]
    has_next_N = torch.zeros_like(index_N, dtype=torch.bool)
    has_next_N[:-1] = sequence_N[:-1] == sequence_N[1:]
    return Chain(index_N, has_next_N)


def shift_left(values_N: Tensor, *, by: int = 1) -> Tensor:
    """[N] the value `by` places further, 0 beyond the end."""
    return torch.cat([values_N[by:], torch.zeros_like(values_N[:by])])


def discounted_suffix_sum(values_N: Tensor, decay_N: Tensor) -> Tensor:
    """y_n = values_n + decay_n * y_{n+1}, by doubling: log2(N) vector steps (Hillis and Steele, 1986). Returns [N].

    decay_N: [N], 0 where a sequence ends.
    """
    reach = 1
    while reach < len(values_N):
        values_N = values_N + decay_N * shift_left(values_N, by=reach)
        decay_N = decay_N * shift_left(decay_N, by=reach)
        reach *= 2
    return values_N
