"""GLM-4-0414, dense: gate and up in one tensor, four norms a layer, rotary embeddings interleaved on half of a head."""

from __future__ import annotations

from typing import Any

from slime.backends.megatron_utils.names.family import Family, common_shape
from slime.backends.megatron_utils.names.layouts import FUSED_GATE_UP, REPLICATED, ROW
from slime.backends.megatron_utils.names.model_shape import ModelShape
from slime.backends.megatron_utils.names.rows import NORMS, Row, attention

_FUSED_MLP = (
    Row("mlp.linear_fc1.weight", FUSED_GATE_UP, {"mlp.gate_up_proj.weight": ("gate_and_up", "hidden")}),
    Row("mlp.linear_fc2.weight", ROW, {"mlp.down_proj.weight": ("hidden", "ffn")}),
)
_SANDWICH_NORMS = (
    Row("post_self_attn_layernorm.weight", REPLICATED, {"post_self_attn_layernorm.weight": ("hidden",)}),
    Row("post_mlp_layernorm.weight", REPLICATED, {"post_mlp_layernorm.weight": ("hidden",)}),
)


def _shape(config: Any) -> ModelShape:
    percent = config.rope_parameters["partial_rotary_factor"]
    return common_shape(
        config,
        qkv_bias=config.attention_bias,
        rotary_percent=percent,
        rotary_interleaved=True,
        sandwich_norms=True,
    )


def _layer_rows(shape: ModelShape, layer: int) -> tuple[Row, ...]:
    return (*NORMS, *_SANDWICH_NORMS, *attention(shape), *_FUSED_MLP)


FAMILY = Family(_shape, _layer_rows)
