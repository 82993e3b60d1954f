"""DeepSeek-V3 and R1: multi-head latent attention and the experts of GLM-4.5; the MTP layer is left alone."""

from __future__ import annotations

from typing import Any

from slime.backends.megatron_utils.names.families.glm4_moe import mlp_rows, sigmoid_experts
from slime.backends.megatron_utils.names.family import Family, common_shape
from slime.backends.megatron_utils.names.model_shape import MLA, ModelShape, NameMapError
from slime.backends.megatron_utils.names.rows import NORMS, Row, latent_attention


def _shape(config: Any) -> ModelShape:
    if config.attention_bias or not config.rope_interleave:
        raise NameMapError("config.json: attention_bias must be false and rope_interleave true for deepseek_v3.")
    if config.rms_norm_eps != 1e-6:
        raise NameMapError(
            f"config.json: rms_norm_eps must be 1e-6 for deepseek_v3, got {config.rms_norm_eps:g}: latent attention of "
            "transformers has that one in any case, and Megatron-core has one for all norms."
        )
    mla = MLA(
        config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    )
    shape = common_shape(config, moe=sigmoid_experts(config), mla=mla)
    if shape.rope_scaling is not None and shape.rope_scaling.kind != "yarn":
        raise NameMapError(f"config.json: rope_type must be default or yarn, got {shape.rope_scaling.kind}.")
    return shape


def _layer_rows(shape: ModelShape, layer: int) -> tuple[Row, ...]:
    return (*NORMS, *latent_attention(shape), *mlp_rows(shape, layer))


FAMILY = Family(_shape, _layer_rows)
