"""Attention over packed sequences, exact: no token sees another sequence. Registered with transformers as "packed".

Shapes: N tokens of S sequences laid end to end, U of them computed; H query heads, K key-value heads, D head width.
Ranks that share the tokens call it with their L of U = P x L (`ContextGroup`).
On a GPU this is torch's variable-length kernel, which takes half precision only. Elsewhere sequences of similar length
are padded on the right and run as one causal batch: under a causal mask what stands to the right cannot reach a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from slime.backends.fsdp_utils.context_parallel import ContextGroup
from slime.backends.fsdp_utils.prompt_sharing import Sharing
from slime.backends.shared.varlen import Lengths, varlen_attention
from slime.utils.device import to_device

NAME = "packed"
_SHORTEST_IN_BUCKET = 0.7  # of the longest: at most 30% of a padded batch is padding


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length as one right-padded batch."""

    gather: Tensor  # int64 [B, L] in [0, U): the token at each place; padding repeats the sequence's last one
    packed: Tensor  # int64 [n]: the packed positions that this bucket holds, each once
    padded: Tensor  # int64 [n]: where they stand in the flattened batch

    def to(self, device: torch.device) -> Bucket:
        """The same on `device`."""
        return Bucket(*(to_device(tensor, device) for tensor in (self.gather, self.packed, self.padded)))


@dataclass(frozen=True)
class Packing:
    """How sequences lie in the packed stream; passed through the model to every attention layer."""

    sequence_lengths: list[int]
    device: torch.device
    sharing: Sharing | None = None
    context: ContextGroup | None = None  # who computes the tokens that `sharing` names, in its order

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [S + 1]: where each sequence starts, and the end."""
        ends = torch.tensor(self.sequence_lengths).cumsum(0)
        return to_device(F.pad(ends, (1, 0)).to(torch.int32), self.device)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The sequences, longest first, in padded batches."""
        buckets = [bucket.to(self.device) for bucket in _buckets(torch.tensor(self.sequence_lengths))]
        if self.sharing is None:
            return buckets
        return [replace(bucket, gather=self.sharing.place[bucket.gather]) for bucket in buckets]

    @cached_property
    def inverse(self) -> Tensor:
        """int64 [U]: place of each computed token in the concatenated buckets."""
        inverse = torch.cat([bucket.packed for bucket in self.buckets]).argsort()
        return inverse if self.sharing is None else inverse[self.sharing.first]


def _buckets(lengths: Tensor) -> list[Bucket]:
    starts = lengths.cumsum(0) - lengths
    buckets: list[Bucket] = []
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        longest = int(lengths[order[0]])
        size = int((lengths[order] >= _SHORTEST_IN_BUCKET * longest).sum())
        members, order = order[:size], order[size:]
        places = torch.arange(longest)
        is_real = places < lengths[members][:, None]
        gather = starts[members][:, None] + places.clamp(max=longest - 1).minimum(lengths[members][:, None] - 1)
        buckets.append(Bucket(gather, gather[is_real], is_real.flatten().nonzero()[:, 0]))
    return buckets


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence, as transformers calls it.

    query: [1, H, U, D]; key, value: [1, K, U, D]. Returns [1, U, H, D]. Raises ValueError for what it does not do:
    capped scores (softcap), sinks (s_aux), a model that does not hand on its keyword arguments.
    """
    if packing is None:
        raise ValueError(
            f"{type(module).__name__} does not hand its keyword arguments to attention: packed sequences would leak. "
            "Choose another --attn-implementation."
        )
    if softcap is not None or s_aux is not None:
        wants = "caps attention scores" if s_aux is None else "has attention sinks"
        raise ValueError(f"{type(module).__name__} {wants}, which --attn-implementation packed cannot do.")
    window = sliding_window if sliding_window and max(packing.sequence_lengths) > sliding_window else None
    if packing.context is not None:
        query, key, value = packing.context.to_heads(query, key, value)
    attend = _bucketed if query.device.type == "cpu" or query.dtype == torch.float32 else _varlen
    out = attend(query, key, value, packing, scaling, window)
    return out if packing.context is None else packing.context.to_tokens(out), None


def _bucketed(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]  # [U, heads, D]
    outputs = []
    for bucket in packing.buckets:
        batch, length = bucket.gather.shape
        q, k, v = (
            row.index_select(0, bucket.gather.flatten()).view(batch, length, *row.shape[1:]).transpose(1, 2)
            for row in rows
        )
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if window is None else _window_mask(length, window, query.device),
            is_causal=window is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, bucket.padded))
    return torch.cat(outputs).index_select(0, packing.inverse)[None]


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[L, L] bool: each token sees itself and the `window - 1` before it."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < window)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [U, heads, D]
    sharing = packing.sharing
    if sharing is not None:
        q, k, v = (sharing.spread(tensor) for tensor in (q, k, v))  # [N, heads, D]
    longest = max(packing.sequence_lengths)
    lengths = Lengths(packing.cu_seqlens, packing.cu_seqlens, longest, longest)
    out = varlen_attention(q, k, v, lengths, scale=scaling, window=window)
    return (out if sharing is None else sharing.collect(out))[None]


def register_packed_attention() -> None:
    """Make `attn_implementation="packed"` known to transformers.

    It builds no mask for a name that its `AttentionMaskInterface` does not know, and looks at no position, which would
    wait for the GPU.
    """
    AttentionInterface.register(NAME, packed_attention)
