"""From the shape of a model and the settings of a run to Megatron's own configurations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.megatron_utils.names import ModelShape
from slime.backends.megatron_utils.names.model_shape import MoE
from slime.config import OptimizerConfig


def transformer_config(
    shape: ModelShape, cfg: MegatronConfig, *, dtype: torch.dtype, device: torch.device, transformer_engine: bool
) -> TransformerConfig:
    """What the layers are made from. Raises ValueError for a model that cannot be built here."""
    _check_buildable(shape)
    is_cuda = device.type == "cuda"
    fields: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_groups,
        "kv_channels": shape.head_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "rotary_interleaved": shape.rotary_interleaved,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": not is_cuda,
        "calculate_per_token_loss": True,  # gradients are added up among ranks, divided by nothing
        "variable_seq_lengths": True,
        "bias_activation_fusion": is_cuda,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": transformer_engine,
    }
    fields |= _parallel(cfg) | _memory(cfg) | _experts(shape.moe, cfg) | _further(cfg, TransformerConfig)
    return TransformerConfig(**fields)


def _check_buildable(shape: ModelShape) -> None:
    refused = {
        "multi-head latent attention": shape.mla is not None,
        "norms after attention and MLP": shape.sandwich_norms,
        "yarn rope scaling": shape.rope_scaling is not None and shape.rope_scaling.kind == "yarn",
    }
    if found := [what for what, has in refused.items() if has]:
        raise ValueError(f"--train-backend megatron cannot build {shape.family} models: {found[0]}")


def _parallel(cfg: MegatronConfig) -> dict[str, Any]:
    tensor = cfg.tensor_model_parallel_size
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": cfg.pipeline_model_parallel_size,
        "context_parallel_size": cfg.context_parallel_size,
        "expert_model_parallel_size": cfg.expert_model_parallel_size,
        "expert_tensor_parallel_size": cfg.expert_tensor_parallel_size or tensor,
        "sequence_parallel": cfg.sequence_parallel,
        "moe_token_dispatcher_type": cfg.moe_token_dispatcher_type,
    }


def _memory(cfg: MegatronConfig) -> dict[str, Any]:
    modules = {} if cfg.recompute_modules is None else {"recompute_modules": cfg.recompute_modules}
    return modules | {
        "recompute_granularity": cfg.recompute_granularity,
        "recompute_method": cfg.recompute_method,
        "recompute_num_layers": cfg.recompute_num_layers,
        "attention_dropout": cfg.attention_dropout,
        "hidden_dropout": cfg.hidden_dropout,
    }


def _experts(moe: MoE | None, cfg: MegatronConfig) -> dict[str, Any]:
    if moe is None:
        return {}
    groups = {"moe_router_num_groups": moe.num_groups, "moe_router_group_topk": moe.top_groups}
    return (groups if moe.num_groups > 1 else {}) | {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
        "moe_router_score_function": moe.scores,
        "moe_router_enable_expert_bias": moe.has_bias,
        "moe_router_bias_update_rate": 0.0,  # the bias is the model's, as the engines have it
        "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1.0 else None,
        "moe_router_load_balancing_type": "aux_loss" if cfg.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": cfg.moe_aux_loss_coeff,
        "moe_router_dtype": cfg.moe_router_dtype,
        "moe_grouped_gemm": cfg.moe_grouped_gemm,
        "moe_permute_fusion": cfg.moe_permute_fusion,
    }


def ddp_config(cfg: MegatronConfig) -> DistributedDataParallelConfig:
    """How gradients are added up."""
    fields: dict[str, Any] = {
        "use_distributed_optimizer": cfg.use_distributed_optimizer,
        "overlap_grad_reduce": cfg.overlap_grad_reduce,
        "grad_reduce_in_fp32": cfg.accumulate_allreduce_grads_in_fp32,
    }
    return DistributedDataParallelConfig(**fields | _further(cfg, DistributedDataParallelConfig))


def optimizer_config(run: OptimizerConfig, cfg: MegatronConfig, *, dtype: torch.dtype) -> MegatronOptimizerConfig:
    """Megatron's optimizer with the settings of the run; the learning rate is set at every step."""
    fields: dict[str, Any] = {
        "optimizer": run.optimizer,
        "lr": run.lr,
        "weight_decay": run.weight_decay,
        "adam_beta1": run.adam_beta1,
        "adam_beta2": run.adam_beta2,
        "adam_eps": run.adam_eps,
        "clip_grad": run.clip_grad,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": cfg.use_distributed_optimizer,
    }
    return MegatronOptimizerConfig(**fields | _further(cfg, MegatronOptimizerConfig))


def _further(cfg: MegatronConfig, kind: Any) -> dict[str, Any]:
    """Those of --megatron-args that this configuration has."""
    names = {item.name for item in dataclasses.fields(kind)}
    return {name: value for name, value in cfg.megatron_args.items() if name in names}


def padded_vocab_size(vocab_size: int, cfg: MegatronConfig) -> int:
    """Rows of the embedding: a multiple of the tensor-parallel ranks, so that each holds as many."""
    return math.ceil(vocab_size / cfg.tensor_model_parallel_size) * cfg.tensor_model_parallel_size


def model_arguments(shape: ModelShape, cfg: MegatronConfig, longest: int) -> dict[str, Any]:
    """What GPTModel takes besides the configuration and the layers."""
    scaling = shape.rope_scaling
    return {
        "vocab_size": padded_vocab_size(shape.vocab_size, cfg),
        "max_sequence_length": longest,
        "position_embedding_type": "rope",
        "rotary_base": shape.rotary_base,
        "rotary_percent": shape.rotary_percent,
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": 1.0 if scaling is None else scaling.factor,
        "share_embeddings_and_output_weights": shape.tied,
    }
