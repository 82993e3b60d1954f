"""Core attention on torch alone: exact over packed sequences, for any context-parallel size.

Megatron's own needs Transformer Engine for either. On a GPU in half precision it is torch's variable-length kernel;
elsewhere one call for each segment. Shapes: n tokens of this rank, H query heads, K key-value heads, D width of queries
and keys, W of values; m keys, of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.backends.megatron_utils.packing import Packing, Segment
from slime.backends.megatron_utils.rotary import rotate
from slime.backends.shared.varlen import Lengths, varlen_attention


class PackedAttention(MegatronModule):
    """`core_attention` of a layer spec."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **other: Any,
    ) -> None:
        super().__init__(config=config)
        self.context_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Tensor:
        """query: [n, H, D]; key: [n, K, D]; value: [n, K, W]. Returns [n, H * W]."""
        packing = options["packed_seq_params"]
        assert isinstance(packing, Packing), "attention of sequences that are not packed"
        if packing.rotation is not None and not options.get("is_rotated"):
            query, key = rotate(query, packing.rotation), rotate(key, packing.rotation)
        if packing.key_index is not None:
            key, value = (self._keys(tensor, packing.key_index) for tensor in (key, value))
        dropout = self.dropout if self.training else 0.0
        if query.is_cuda and query.dtype != torch.float32 and dropout == 0.0:
            out = varlen_attention(query, key, value, _lengths(packing), scale=self.scale)
        else:
            out = _by_segment(query, key, value, packing.segments, self.scale, dropout)
        return out.flatten(1)

    def _keys(self, local: Tensor, key_index: Tensor) -> Tensor:
        """[n, K, D] of this rank -> [m, K, D]: what each segment's queries may see, from all ranks."""
        gathered: Tensor = gather_from_sequence_parallel_region(local.contiguous(), group=self.context_group)
        return gathered.index_select(0, key_index)


def has_packed_attention(layer: Any) -> bool:
    """Whether a transformer layer has slime's attention, which rotates queries and keys itself."""
    return isinstance(getattr(getattr(layer, "self_attention", None), "core_attention", None), PackedAttention)


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], scale: float | None, dropout: float
) -> Tensor:
    queries = query.split([segment.num_queries for segment in segments])
    keys, values = (tensor.split([segment.num_keys for segment in segments]) for tensor in (key, value))
    outputs = []
    for segment, *tensors in zip(segments, queries, keys, values, strict=True):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in tensors)  # [1, heads, length, D]
        mask = torch.ones(segment, dtype=torch.bool, device=query.device).tril(segment.num_keys - segment.num_queries)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _lengths(packing: Packing) -> Lengths:
    assert packing.cu_queries is not None
    assert packing.cu_keys is not None
    queries, keys = (max(lengths) for lengths in zip(*packing.segments, strict=True))
    return Lengths(packing.cu_queries, packing.cu_keys, queries, keys)
