"""From the shape of a model and the settings of a run to Megatron's own configurations."""

from __future__ import annotations

import logging
import math
import os
import shutil
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.megatron_utils.effects import fields_for, has_effect
from slime.backends.megatron_utils.model_arguments import gpt_model_options, transformer_config_fields
from slime.backends.megatron_utils.names import ModelShape
from slime.backends.megatron_utils.stages import num_virtual_stages
from slime.config.base import ConfigError
from slime.config.run import RunConfig

logger = logging.getLogger(__name__)

LONGEST = 2**31  # positions: rotary embeddings are made for the sequences that come


def transformer_config(
    shape: ModelShape,
    cfg: MegatronConfig,
    *,
    context_size: int,
    dtype: torch.dtype,
    device: torch.device,
    transformer_engine: bool,
) -> TransformerConfig:
    """What the layers are made from. Raises ConfigError for a model that cannot be built here."""
    if shape.mla is not None and shape.mla.q_rank is None and transformer_engine:
        # later Megatron-LM norms queries there that the model does not
        raise ConfigError("Latent attention without q_lora_rank needs --transformer-impl local.")
    is_cuda = device.type == "cuda"
    fields: dict[str, Any] = {
        "context_parallel_size": context_size,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu_initialization": not is_cuda,
        "calculate_per_token_loss": True,  # gradients are added up among ranks, divided by nothing
        "variable_seq_lengths": True,
        "bias_activation_fusion": is_cuda and _has_compiler(),
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": transformer_engine and not shape.rotary_interleaved and shape.mla is None,
    }
    kind = TransformerConfig if shape.mla is None else MLATransformerConfig
    further = fields_for(kind, cfg.megatron_args)
    return kind(**fields | transformer_config_fields(shape) | _parallel(cfg, shape) | _settings(cfg) | further)


def _has_compiler() -> bool:
    """Whether torch can compile what Megatron fuses."""
    return any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


def _parallel(cfg: MegatronConfig, shape: ModelShape) -> dict[str, Any]:
    tensor = cfg.tensor_model_parallel_size
    if shape.moe is not None and tensor > 1 and not cfg.sequence_parallel:
        raise ConfigError("Experts with --tensor-model-parallel-size above 1 need --sequence-parallel.")
    num_virtual = num_virtual_stages(cfg, shape.num_layers)
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": cfg.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": num_virtual if num_virtual > 1 else None,
        # Of virtual stages two ranks exchange activations and gradients at once: sent together they would be mixed up.
        "overlap_p2p_comm": num_virtual > 1,
        "batch_p2p_comm": num_virtual == 1,
        "num_layers_in_first_pipeline_stage": cfg.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": cfg.decoder_last_pipeline_num_layers,
        "expert_model_parallel_size": cfg.expert_model_parallel_size,
        "expert_tensor_parallel_size": cfg.expert_tensor_parallel_size or tensor,
        "sequence_parallel": cfg.sequence_parallel,
        "moe_token_dispatcher_type": cfg.moe_token_dispatcher_type,
    }


def _settings(cfg: MegatronConfig) -> dict[str, Any]:
    modules = {} if cfg.recompute_modules is None else {"recompute_modules": cfg.recompute_modules}
    router = {} if cfg.moe_router_dtype is None else {"moe_router_dtype": cfg.moe_router_dtype}
    return {
        **modules,
        **router,
        "recompute_granularity": cfg.recompute_granularity,
        "recompute_method": cfg.recompute_method,
        "recompute_num_layers": cfg.recompute_num_layers,
        "attention_dropout": cfg.attention_dropout,
        "hidden_dropout": cfg.hidden_dropout,
        "moe_router_load_balancing_type": "aux_loss" if cfg.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": cfg.moe_aux_loss_coeff,
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
    return DistributedDataParallelConfig(**fields | fields_for(DistributedDataParallelConfig, cfg.megatron_args))


def optimizer_config(run: RunConfig, cfg: MegatronConfig, *, dtype: torch.dtype) -> MegatronOptimizerConfig:
    """Megatron's optimizer with the settings of the run; the learning rate is set at every step."""
    fields: dict[str, Any] = {
        "optimizer": run.optimizer,
        "lr": run.lr,
        "weight_decay": run.weight_decay,
        "sgd_momentum": run.sgd_momentum,
        "adam_beta1": run.adam_beta1,
        "adam_beta2": run.adam_beta2,
        "adam_eps": run.adam_eps,
        "clip_grad": run.clip_grad,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "initial_loss_scale": run.initial_loss_scale,
        "loss_scale_window": run.loss_scale_window,
        "hysteresis": 1,  # the scale halves with each overflow
        "params_dtype": dtype,
        "use_distributed_optimizer": cfg.use_distributed_optimizer,
    }
    return MegatronOptimizerConfig(**fields | fields_for(MegatronOptimizerConfig, cfg.megatron_args))


def warn_of_settings_without_effect(cfg: MegatronConfig) -> None:
    """Of --megatron-args: those of parts of Megatron that slime does not use."""
    for name in sorted(cfg.megatron_args):
        if not has_effect(name):
            logger.warning("%s has no effect: slime does it in its own way, or not at all", name)


def model_options(shape: ModelShape, cfg: MegatronConfig, *, is_critic: bool) -> dict[str, Any]:
    """What GPTModel takes besides the configuration and the layers. A critic's output layer is its own."""
    padded = math.ceil(shape.vocab_size / cfg.tensor_model_parallel_size) * cfg.tensor_model_parallel_size
    options = {"vocab_size": padded, "max_sequence_length": LONGEST, **gpt_model_options(shape)}
    return options | ({"share_embeddings_and_output_weights": False} if is_critic else {})
