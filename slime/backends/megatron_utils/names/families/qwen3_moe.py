"""Qwen3 with experts: every layer has them, chosen by softmax."""

from __future__ import annotations

from typing import Any

from slime.backends.megatron_utils.names.family import Family, common_shape
from slime.backends.megatron_utils.names.model_shape import ModelShape, MoE, NameMapError
from slime.backends.megatron_utils.names.rows import EXPERTS, NORMS, Row, attention


def _shape(config: Any) -> ModelShape:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise NameMapError("config.json: every layer must have experts (mlp_only_layers [], decoder_sparse_step 1).")
    if config.attention_bias or not config.norm_topk_prob:
        raise NameMapError("config.json: attention_bias must be false and norm_topk_prob true for qwen3_moe.")
    moe = MoE(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)
    return common_shape(config, qk_norm=True, moe=moe)


def _layer_rows(shape: ModelShape, layer: int) -> tuple[Row, ...]:
    return (*NORMS, *attention(shape), *EXPERTS)


FAMILY = Family(_shape, _layer_rows)
