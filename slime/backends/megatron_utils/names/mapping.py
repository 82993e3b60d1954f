"""From a Megatron parameter of a rank to the HF tensors it is made of, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from slime.backends.megatron_utils.names.layouts import PADDING, REPLICATED, Layout, Piece, vocabulary
from slime.backends.megatron_utils.names.model_shape import ModelShape, NameMapError
from slime.backends.megatron_utils.names.rows import Row
from slime.backends.megatron_utils.names.shape import family_of

Read = Callable[[str, int, int, int], Tensor]
"""`read(name, axis, start, stop)`: that part of an HF tensor."""

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_proj.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_DOWN_PROJECTIONS = ("self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight")
_LAYER = re.compile(r"(?:module\.)*decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))")


@dataclass(frozen=True)
class ParallelPlace:
    """Where a model chunk stands. layers: the global numbers, from 0, of its decoder layers, in order.

    padded_vocab_size: rows of the whole embedding; None: the vocabulary's own size.
    shards_down_projections: latent attention's down projections are split among tensor-parallel ranks (the local spec),
    not held by each (Transformer Engine's).
    """

    layers: Sequence[int]
    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    padded_vocab_size: int | None = None
    shards_down_projections: bool = False


class HFTensor(NamedTuple):
    """A tensor of an HF checkpoint: its full shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Mapped:
    """A Megatron parameter under its global name (layers and experts counted over the whole model).

    rank, num_shards: which part of it this rank holds. is_copy: another parameter holds the same tensors.
    """

    name: str
    hf: tuple[HFTensor, ...]
    layout: Layout
    rank: int
    num_shards: int
    is_copy: bool = False

    def pieces(self, rank: int) -> list[Piece]:
        """What shard `rank` is made of."""
        return self.layout.pieces([shape[self.layout.axis] for _, shape in self.hf], rank, self.num_shards)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of shard `rank`."""
        shape = list(self.hf[0].shape)
        shape[self.layout.axis] = sum(piece.length for piece in self.pieces(rank))
        return tuple(shape)

    def whole(self) -> Mapped:
        """The same parameter in one part."""
        return replace(self, rank=0, num_shards=1)


def map_parameter(shape: ModelShape, place: ParallelPlace, name: str) -> Mapped:
    """What the parameter that a model chunk calls `name` is made of. Raises NameMapError for one that no table has."""
    address = _address(place, shape, name)
    row = _rows(shape, address.layer).get(address.row)
    if row is None:
        raise NameMapError(f"parameter {name} of the Megatron model is in no table of {shape.family}")
    return _mapped(row, address, shape, place)


def all_parameters(shape: ModelShape, *, padded_vocab_size: int | None = None) -> Iterator[Mapped]:
    """Every parameter of the model in one part, from the embedding to the output."""
    place = ParallelPlace(layers=range(shape.num_layers), padded_vocab_size=padded_vocab_size)
    top = _rows(shape, None)
    yield _mapped(top["embedding.word_embeddings.weight"], _Address("", None, None), shape, place)
    for layer in range(shape.num_layers):
        for row in _rows(shape, layer).values():
            experts = range(shape.size("experts")) if "{expert}" in row.megatron else (None,)
            for expert in experts:
                yield _mapped(row, _Address("", layer, expert), shape, place)
    yield _mapped(top["decoder.final_layernorm.weight"], _Address("", None, None), shape, place)
    yield _mapped(top["output_layer.weight"], _Address("", None, None), shape, place)


def canonical_name(shape: ModelShape, place: ParallelPlace, name: str) -> str:
    """The global name, with the local spec's words, of what a model chunk calls `name`."""
    return map_parameter(shape, place, name).name


def local_tensor(mapped: Mapped, read: Read) -> Tensor:
    """The part that this rank holds, made of slices that `read` brings; padding is zero."""
    axis = mapped.layout.axis
    parts = []
    for piece in mapped.pieces(mapped.rank):
        if piece.source == PADDING:
            size = [*mapped.hf[0].shape]
            size[axis] = piece.length
            parts.append(read(mapped.hf[0].name, axis, 0, 0).new_zeros(size))
        else:
            parts.append(read(mapped.hf[piece.source].name, axis, piece.start, piece.stop))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def fill_local(mapped: Mapped, read: Read, out: Tensor) -> None:
    """Write the part that this rank holds into `out`, slice by slice, in the dtype of `out`; padding becomes zero."""
    expected = mapped.local_shape(mapped.rank)
    if tuple(out.shape) != expected:
        raise NameMapError(f"{mapped.name} must have shape {expected}, the model has {tuple(out.shape)}")
    offset = 0
    for piece in mapped.pieces(mapped.rank):
        part = out.narrow(mapped.layout.axis, offset, piece.length)
        offset += piece.length
        if piece.source == PADDING:
            part.zero_()
        else:
            part.copy_(read(mapped.hf[piece.source].name, mapped.layout.axis, piece.start, piece.stop))


def hf_tensors(mapped: Mapped, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """The HF tensors that the shards of all ranks, in order, make up; [] for a copy of tied weights.

    shards: `mapped.num_shards` tensors; of a parameter that is not sharded, one.
    """
    if mapped.is_copy:
        return []
    if len(shards) != mapped.num_shards:
        raise ValueError(f"{mapped.name}: {mapped.num_shards} shards are needed, got {len(shards)}")
    for rank, shard in enumerate(shards):
        if tuple(shard.shape) != mapped.local_shape(rank):
            expected = mapped.local_shape(rank)
            raise NameMapError(f"{mapped.name}: shard {rank} must have shape {expected}, got {tuple(shard.shape)}")
    if not mapped.layout.is_sharded:
        return [(mapped.hf[0].name, shards[0])]
    tensors = [shards[0].new_empty(shape) for _, shape in mapped.hf]
    axis = mapped.layout.axis
    for rank, shard in enumerate(shards):
        pieces = mapped.pieces(rank)
        ends = list(accumulate(piece.length for piece in pieces))
        for piece, end in zip(pieces, ends, strict=True):
            if piece.source != PADDING:
                part = shard.narrow(axis, end - piece.length, piece.length)
                tensors[piece.source].narrow(axis, piece.start, piece.length).copy_(part)
    return [(name, tensor) for (name, _), tensor in zip(mapped.hf, tensors, strict=True)]


class _Address(NamedTuple):
    """The row's name, and the layer and expert that it is filled with."""

    row: str
    layer: int | None
    expert: int | None


def _address(place: ParallelPlace, shape: ModelShape, name: str) -> _Address:
    match = _LAYER.fullmatch(name)
    if match is None:
        return _Address(re.sub(r"^(module\.)+", "", name), None, None)
    if int(match[1]) >= len(place.layers):
        raise NameMapError(f"parameter {name}: the place has {len(place.layers)} layers only")
    layer, rest = place.layers[int(match[1])], match[2]
    if shape.moe is None or (expert := _EXPERT.fullmatch(rest)) is None:
        return _Address(_FUSED_NORMS.get(rest, rest), layer, None)
    number, linear = int(expert[1] or expert[4]), expert[2] or expert[3]
    first = place.ep_rank * (shape.size("experts") // place.ep_size)
    return _Address(f"mlp.experts.local_experts.{{expert}}.{linear}.weight", layer, first + number)


@lru_cache(maxsize=4096)
def _rows(shape: ModelShape, layer: int | None) -> dict[str, Row]:
    rows = _top_rows(shape) if layer is None else family_of(shape).layer_rows(shape, layer)
    return {row.megatron: row for row in rows}


def _top_rows(shape: ModelShape) -> tuple[Row, ...]:
    layout = vocabulary(shape.vocab_size)
    axes = ("vocab", "hidden")
    output = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    return (
        Row("embedding.word_embeddings.weight", layout, {"model.embed_tokens.weight": axes}),
        Row("decoder.final_layernorm.weight", REPLICATED, {"model.norm.weight": ("hidden",)}),
        Row("output_layer.weight", layout, {output: axes}, is_copy=shape.tied),
    )


def _mapped(row: Row, address: _Address, shape: ModelShape, place: ParallelPlace) -> Mapped:
    layer, expert = address.layer, address.expert
    ours, theirs = ("", "") if layer is None else (f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    layout = row.layout
    if row.megatron in _DOWN_PROJECTIONS and not place.shards_down_projections:
        layout = REPLICATED
    if layer is None and layout is not REPLICATED:
        layout = vocabulary(place.padded_vocab_size or shape.vocab_size)
    rank, size = (place.tp_rank, place.tp_size) if expert is None else (place.etp_rank, place.etp_size)
    return Mapped(
        name=ours + row.megatron.replace("{expert}", str(expert)),
        hf=tuple(
            HFTensor(theirs + name.replace("{expert}", str(expert)), tuple(shape.size(axis) for axis in axes))
            for name, axes in row.hf.items()
        ),
        layout=layout,
        rank=rank if layout.is_sharded else 0,
        num_shards=size if layout.is_sharded else 1,
        is_copy=row.is_copy,
    )
