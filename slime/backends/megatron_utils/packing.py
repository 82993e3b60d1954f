"""A micro-batch as Megatron takes it: packed sequences, of which a context-parallel rank holds two chunks each.

Shapes: N packed tokens, S sequences, T response tokens; n tokens and t response tokens of this rank. Among C
context-parallel ranks each sequence is padded to 2C equal chunks, and rank r holds chunks r and 2C - 1 - r: under a
causal mask all ranks then have equal work. Padding stands at the end of a sequence, where no real token sees it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from slime.backends.megatron_utils.rotary import Rotation
from slime.data.packed import PackedBatch
from slime.utils.device import to_device


class Split(NamedTuple):
    """How tokens of a sequence are shared. tensor_size: ranks that share them further, with sequence parallel."""

    context_rank: int = 0
    context_size: int = 1
    tensor_size: int = 1
    tensor_rank: int = 0


class Segment(NamedTuple):
    """Queries of one attention problem, and the keys that they may see: the last query sees all of them."""

    num_queries: int
    num_keys: int


@dataclass
class Packing(PackedSeqParams):
    """What Megatron hands to every attention layer; what it has not itself is read by slime's own attention.

    key_index: int64, places of the segments' keys among those gathered from all context-parallel ranks.
    rotation: where attention rotates queries and keys.
    """

    segments: list[Segment] = field(default_factory=list)
    key_index: Tensor | None = None
    cu_queries: Tensor | None = None  # int32 [segments + 1], on the device
    cu_keys: Tensor | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Inputs:
    """One micro-batch on this rank's device."""

    input_ids: Tensor  # int64 [1, n]
    position_ids: Tensor  # int64 [1, n]
    packing: Packing
    predictors: Tensor  # int64 [t] in [0, n): the place before each response token
    targets: Tensor  # int64 [t]
    kept: Tensor  # int64 [t] in [0, T): which response tokens of the micro-batch these are
    batch: PackedBatch  # [T] fields cut down to [t]; without experts
    whole: PackedBatch  # as it came, on the host
    places: Tensor  # int64, on the host: the packed token behind each that this rank's layers see; -1 for padding


def inputs_of(batch: PackedBatch, split: Split, device: torch.device, *, on_device: bool = False) -> Inputs:
    """This rank's part of `batch`.

    on_device: lengths lie on the device, as Transformer Engine wants them; else on the host, where reading them waits
    for nothing.
    """
    lengths = padded_lengths(batch.sequence_lengths, split)
    places_N = _places(batch.sequence_lengths, lengths)
    size = sum(lengths)
    input_ids = torch.zeros(size, dtype=torch.int64)
    input_ids[places_N] = batch.input_ids
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    held_n = local_places(lengths, split)
    local_of = torch.full((size,), -1)
    local_of[held_n] = torch.arange(len(held_n))
    packed_of = torch.full((size,), -1)
    packed_of[places_N] = torch.arange(len(places_N))
    predictors_T = local_of[places_N[batch.target_index - 1]]
    kept = (predictors_T >= 0).nonzero()[:, 0]
    return Inputs(
        input_ids=to_device(input_ids[held_n][None], device),
        position_ids=to_device(position_ids[held_n][None], device),
        packing=_packing(lengths, split, device, on_device=on_device),
        predictors=to_device(predictors_T[kept], device),
        targets=to_device(batch.targets[kept], device),
        kept=to_device(kept, device),
        batch=replace(tokens_of(batch, kept), routed_experts=None).to(device),
        whole=batch,
        places=packed_of[held_n].chunk(split.tensor_size)[split.tensor_rank],
    )


def padded_lengths(lengths: list[int], split: Split) -> list[int]:
    """Lengths that all ranks' shares can be cut from; where tensor-parallel ranks want it, one of padding more."""
    unit = 2 * split.context_size if split.context_size > 1 else 1
    padded = [math.ceil(length / unit) * unit for length in lengths]
    missing = -sum(padded) % math.lcm(unit, split.context_size * split.tensor_size)
    return padded + [missing] * (missing > 0)


def local_places(lengths: list[int], split: Split) -> Tensor:
    """int64 [n]: the padded places that this rank holds, in its order."""
    if split.context_size == 1:
        return torch.arange(sum(lengths))
    parts, start = [], 0
    for length in lengths:
        chunk = length // (2 * split.context_size)
        for number in (split.context_rank, 2 * split.context_size - 1 - split.context_rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return torch.cat(parts)


def tokens_of(batch: PackedBatch, kept: Tensor) -> PackedBatch:
    """`batch` with its [T] fields cut down to the response tokens `kept`."""
    if len(kept) == len(batch.target_index):
        return batch
    per_token = [name for name in vars(batch) if name not in ("input_ids", "position_ids", "routed_experts")]
    cut: dict[str, Any] = {name: value[kept] for name in per_token if isinstance(value := getattr(batch, name), Tensor)}
    return replace(batch, **cut)


def _places(lengths: list[int], padded: list[int]) -> Tensor:
    """int64 [N]: where each token stands among the padded sequences."""
    starts = [0]
    for length in padded:
        starts.append(starts[-1] + length)
    return torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)])


def _packing(lengths: list[int], split: Split, device: torch.device, *, on_device: bool) -> Packing:
    cu_seqlens = _cumulative(lengths)
    cu_seqlens = to_device(cu_seqlens, device) if on_device else cu_seqlens
    segments = _segments(lengths, split)
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        segments=segments,
        key_index=to_device(_key_index(lengths, split), device) if split.context_size > 1 else None,
        cu_queries=to_device(_cumulative([segment.num_queries for segment in segments]), device),
        cu_keys=to_device(_cumulative([segment.num_keys for segment in segments]), device),
    )


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _segments(lengths: list[int], split: Split) -> list[Segment]:
    if split.context_size == 1:
        return [Segment(length, length) for length in lengths]
    rank, size = split.context_rank, split.context_size
    chunks = [(length // (2 * size), number) for length in lengths for number in (rank, 2 * size - 1 - rank)]
    return [Segment(chunk, (number + 1) * chunk) for chunk, number in chunks]


def _key_index(lengths: list[int], split: Split) -> Tensor:
    """int64: for each segment its sequence's places from the start, among the ranks' tokens laid end to end."""
    held = torch.cat([local_places(lengths, split._replace(context_rank=rank)) for rank in range(split.context_size)])
    gathered_of = held.argsort()
    parts, start = [], 0
    for length, first, second in zip(lengths, *_of_pairs(_segments(lengths, split)), strict=True):
        parts += [gathered_of[start : start + segment.num_keys] for segment in (first, second)]
        start += length
    return torch.cat(parts)


def _of_pairs(segments: list[Segment]) -> tuple[list[Segment], list[Segment]]:
    return segments[::2], segments[1::2]
