"""Context parallelism: ranks share the tokens of a pack and, in attention, its heads (Ulysses, arXiv:2309.14509).

Shapes: P ranks with L tokens each; H heads, D wide; T response tokens of the pack, O of them this rank's.

A worked example, five tokens on P = 2 ranks (L = 3). They are dealt in turn, so that each rank has its part of the
response tokens, whose logits cost most; a place that is left over repeats the first token, and nobody reads it:

    rank 0: [t0 t2 t4]      rank 1: [t1 t3 t0]

All of a model but attention works token by token. For attention an all-to-all trades tokens for heads: each rank gets
H / P heads of all P x L tokens and computes them over whole sequences; a second one trades back. What the model says of
response tokens is completed on every rank, 4 bytes a token, so that losses and hooks see whole samples; each rank
computes the same loss and takes the gradient of its own tokens. Parameters' gradients of all ranks add up.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from slime.backends.fsdp_utils.prompt_sharing import Sharing
from slime.training.backend import TokenOutputs


@dataclass(frozen=True)
class ContextGroup:
    """The `size` ranks, consecutive ones, that share a pack; this one is their `rank`-th."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def deal(self, sharing: Sharing | None, num_tokens: int) -> Sharing:
        """The tokens that are computed, those of rank 0 first, then those of rank 1, as many on each.

        sharing: which of the pack's `num_tokens` are computed, on the host; None for all.
        """
        every = torch.arange(num_tokens)
        first, place = (every, every) if sharing is None else sharing[:2]
        length = -(-len(first) // self.size)
        first = torch.cat([first, first[:1].expand(self.size * length - len(first))])
        return Sharing(first.view(length, self.size).t().flatten(), place % self.size * length + place // self.size)

    def share(self, dealt: Tensor) -> Tensor:
        """This rank's [L] of [P x L]."""
        return dealt.view(self.size, -1)[self.rank]

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """This rank's heads of all tokens, from all heads of its own: of each [1, H, L, D] a [1, H / P, P x L, D].

        Heads of keys and values that P does not divide are repeated first, so that each rank has those it needs.
        """
        repeated = [tensor.repeat_interleave(self._repeats(tensor.shape[1]), dim=1) for tensor in tensors]
        parts = [tensor.squeeze(0).unflatten(0, (self.size, -1)).transpose(1, 2).flatten(2) for tensor in repeated]
        received = self._exchange(torch.cat(parts, dim=2)).flatten(0, 1).split([part.shape[2] for part in parts], dim=1)
        return [
            part.unflatten(1, (-1, tensor.shape[3])).transpose(0, 1)[None]
            for part, tensor in zip(received, tensors, strict=True)
        ]

    def _repeats(self, num_heads: int) -> int:
        return math.lcm(num_heads, self.size) // num_heads

    def to_tokens(self, out: Tensor) -> Tensor:
        """The way back: all heads of this rank's tokens, [1, P x L, H / P, D] -> [1, L, H, D]."""
        received = self._exchange(out.squeeze(0).unflatten(0, (self.size, -1)).flatten(2))
        return received.transpose(0, 1).unflatten(2, out.shape[2:]).flatten(1, 2)[None]

    def _exchange(self, parts: Tensor) -> Tensor:
        return cast(Tensor, _AllToAll.apply(parts, self.group))

    def complete(self, own: TokenOutputs, places: Tensor, num_targets: int) -> TokenOutputs:
        """Outputs of all T = `num_targets` response tokens. own: of the O at `places`, int64 [O] in [0, T)."""
        fields = {name: value for name, value in vars(own).items() if value is not None}
        whole = {name: _Complete.apply(value, places, num_targets, self.group) for name, value in fields.items()}
        return TokenOutputs(**whole)


def context_group(size: int, *, timeout_minutes: float) -> ContextGroup | None:
    """This rank's group; a collective of the world, which `size` divides. None where nothing is shared."""
    if size == 1:
        return None
    group, _ = dist.new_subgroups(group_size=size, timeout=datetime.timedelta(minutes=timeout_minutes))
    return ContextGroup(group, dist.get_rank() % size, size)


class _AllToAll(torch.autograd.Function):
    """[P, ...]: part p goes to rank p, and what rank p sent takes its place. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return cast(Tensor, _AllToAll.apply(gradients[0], ctx.group)), None


class _Complete(torch.autograd.Function):
    """[O, ...] of each rank, at its `places` in [T, ...]; every rank computes the same from it, so none adds up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, num_targets: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(places)
        whole = own.new_zeros(num_targets, *own.shape[1:]).index_copy_(0, places, own)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None, None
