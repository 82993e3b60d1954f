"""GLM-4.5: first layers dense, then experts chosen by sigmoid with a bias, and shared ones; MTP is left alone."""

from __future__ import annotations

from typing import Any

from slime.backends.megatron_utils.names.family import Family, common_shape
from slime.backends.megatron_utils.names.model_shape import ModelShape, MoE, NameMapError
from slime.backends.megatron_utils.names.rows import (
    EXPERTS,
    GATED_MLP,
    NORMS,
    ROUTER_BIAS,
    SHARED_EXPERTS,
    Row,
    attention,
)


def sigmoid_experts(config: Any) -> MoE:
    """The experts of GLM-4.5 and DeepSeek-V3. Raises NameMapError for a routing that is not Megatron-core's."""
    top_k = config.num_experts_per_tok
    if bool(config.norm_topk_prob) != (top_k > 1):
        raise NameMapError(
            f"config.json: norm_topk_prob must be {top_k > 1} with num_experts_per_tok {top_k}, as in Megatron-core."
        )
    if config.n_group > 1 and top_k // config.topk_group != 2:
        # a group's score: of its best num_experts_per_tok // topk_group there, of its best two in transformers
        raise NameMapError(
            f"config.json: num_experts_per_tok {top_k} must be twice topk_group {config.topk_group} for Megatron-core."
        )
    return MoE(
        config.n_routed_experts,
        top_k,
        config.moe_intermediate_size,
        shared_ffn_size=config.n_shared_experts * config.moe_intermediate_size,
        num_dense_layers=config.first_k_dense_replace,
        scores="sigmoid",
        has_bias=True,
        num_groups=config.n_group,
        top_groups=config.topk_group,
        scale=config.routed_scaling_factor,
    )


def mlp_rows(shape: ModelShape, layer: int) -> tuple[Row, ...]:
    """Dense in the first layers, then experts."""
    return (*EXPERTS, *ROUTER_BIAS, *SHARED_EXPERTS) if shape.has_experts(layer) else GATED_MLP


def _shape(config: Any) -> ModelShape:
    return common_shape(
        config,
        qkv_bias=config.attention_bias,
        qk_norm=config.use_qk_norm,
        rotary_percent=config.rope_parameters["partial_rotary_factor"],
        moe=sigmoid_experts(config),
    )


def _layer_rows(shape: ModelShape, layer: int) -> tuple[Row, ...]:
    return (*NORMS, *attention(shape), *mlp_rows(shape, layer))


FAMILY = Family(_shape, _layer_rows)
