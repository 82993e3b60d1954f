"""Layers of a model: Transformer Engine's, or Megatron's local ones with norms and attention on torch alone."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from slime.backends.megatron_utils.attention import PackedAttention
from slime.backends.megatron_utils.compiled_layer import CompiledLayer
from slime.backends.megatron_utils.latent_attention import LatentAttention
from slime.backends.megatron_utils.sandwich_norms import SandwichNormLayer


def apply_without_transformer_engine() -> None:
    """Megatron-core 0.16: its router reads a name that is not there then, latent attention takes it as there."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE


class Norm(torch.nn.RMSNorm):
    """RMS norm whose gradient Megatron adds up among sequence-parallel ranks; its own torch norm refuses them."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **other: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(
    config: TransformerConfig,
    *,
    transformer_engine: bool,
    sandwich_norms: bool = False,
    compiled: bool = False,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one stage; vp_stage: which virtual one. Checkpoints of both kinds have the same names.

    compiled: see `can_compile`.
    """
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=transformer_engine,
        normalization=config.normalization,
        vp_stage=vp_stage,
    )
    for layer in block.layer_specs:
        layer.module = SandwichNormLayer if sandwich_norms else CompiledLayer if compiled else layer.module
        if transformer_engine:
            continue
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = Norm
        attention = parts.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.multi_latent_attention:
            parts.self_attention.module = LatentAttention
            attention.q_layernorm = attention.kv_layernorm = Norm
        elif config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = Norm
    block.layer_norm = block.layer_norm if transformer_engine else Norm
    return block
