"""Prompts that several samples of a pack share go through the model once.

Under causal attention what a model computes for a prompt does not depend on the response, so the samples of one group
have the same activations there. They are computed once and read by each; the gradients of all add up in them.

A worked example, two responses a and b to the prompt p, and c to q (N = 9 packed tokens, U = 7 unique ones):

    input_ids = [p0 p1 a0 a1 | p0 p1 b0 | q0 c0]
    first     = [ 0  1  2  3           6    7  8]      packed positions that are computed, [U]
    place     = [ 0  1  2  3    0  1   4    5  6]      where each packed token's activations are, [N]
    again     = [               4  5             ]      packed positions that are not computed, [N - U]
    owner     = [               0  1             ]      where their activations are, [N - U]
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from slime.data.packed import PackedBatch
from slime.utils.device import to_device


class Sharing(NamedTuple):
    """Which tokens of a pack are computed, and where each token finds its activations. See the example above."""

    first: Tensor  # int64 [U]: ascending, or rank by rank where several ranks compute them
    place: Tensor  # int64 [N] in [0, U)
    again: Tensor | None = None  # int64 [N - U]; None where `first` names some tokens twice
    owner: Tensor | None = None  # int64 [N - U] in [0, U)

    def to(self, device: torch.device) -> Sharing:
        """The same on `device`."""
        given = {name: numbers for name, numbers in self._asdict().items() if numbers is not None}
        return self._replace(**{name: to_device(numbers, device) for name, numbers in given.items()})

    def spread(self, computed: Tensor) -> Tensor:
        """[U, ...] -> [N, ...]: each token's."""
        if self.again is None:
            return computed.index_select(0, self.place)
        return cast(Tensor, _Spread.apply(computed, self))

    def collect(self, packed: Tensor) -> Tensor:
        """[N, ...] -> [U, ...]: of the tokens that are computed."""
        if self.again is None:
            return packed.index_select(0, self.first)
        return cast(Tensor, _Collect.apply(packed, self))


class _Spread(torch.autograd.Function):
    """Gradients are copied, and those of tokens that are not computed added to them; torch would add up all of them."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, sharing: Sharing) -> Tensor:
        ctx.sharing = sharing
        return computed.index_select(0, sharing.place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), sharing = gradients, ctx.sharing
        total = gradient.index_select(0, sharing.first)
        return total.index_add_(0, sharing.owner, gradient.index_select(0, sharing.again)), None


class _Collect(torch.autograd.Function):
    """No token is taken twice: gradients are copied."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, sharing: Sharing) -> Tensor:
        ctx.sharing, ctx.num_tokens = sharing, len(packed)
        return packed.index_select(0, sharing.first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        packed = gradient.new_zeros(ctx.num_tokens, *gradient.shape[1:])
        return packed.index_copy_(0, ctx.sharing.first, gradient), None


def shared_prompts(batch: PackedBatch) -> Sharing | None:
    """How the sequences of `batch`, which lies on the host, share their prompts; None where no two are equal."""
    lengths = np.asarray(batch.sequence_lengths)
    responses = np.bincount(batch.sequence_ids.numpy(), minlength=len(lengths))
    starts = np.cumsum(lengths) - lengths
    tokens = batch.input_ids.numpy()
    source = np.arange(len(tokens))  # the packed position that computes each token
    seen: dict[bytes, int] = {}
    for start, size in zip(starts, lengths - responses, strict=True):
        owner = seen.setdefault(tokens[start : start + size].tobytes(), start)
        source[start : start + size] = np.arange(owner, owner + size)
    is_first = source == np.arange(len(tokens))
    if is_first.all():
        return None
    place = (np.cumsum(is_first) - 1)[source]
    again = np.flatnonzero(~is_first)
    return Sharing(*map(torch.from_numpy, (np.flatnonzero(is_first), place, again, place[again])))
