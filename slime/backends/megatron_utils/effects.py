"""What settings of Megatron do here: which fields of its configurations they set, and which do nothing."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

KINDS: tuple[Any, ...] = (TransformerConfig, MLATransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
# Where Megatron's parser calls a field otherwise.
RENAMED = {
    "bias_swiglu_fusion": "bias_activation_fusion",
    "check_for_nan_in_loss_and_grad": "check_for_nan_in_grad",
    "ddp_average_in_collective": "average_in_collective",
    "ddp_bucket_size": "bucket_size",
    "ddp_pad_buckets_for_high_nccl_busbw": "pad_buckets_for_high_nccl_busbw",
    "ddp_reduce_scatter_with_fp32_accumulation": "reduce_scatter_with_fp32_accumulation",
    "ddp_param_name_patterns_for_fp32_local_accumulation": "param_name_patterns_for_fp32_local_accumulation",
    "fp8_param_gather": "fp8_param",
}
# Fields of what slime does in its own way: the loss, the step, the learning rate, moments on the host, and the
# gathering of weights when a step ends, since they are read then, and not while the next forward runs.
WITHOUT_EFFECT = frozenset(
    {
        *("barrier_with_L1_time", "cross_entropy_fusion_impl", "cross_entropy_loss_fusion", "decoupled_lr"),
        *("decoupled_min_lr", "log_num_zeros_in_grad", "timers", "defer_embedding_wgrad_compute"),
        *("overlap_param_gather", "overlap_param_gather_with_optimizer_step"),
        *("optimizer_cpu_offload", "optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload"),
        *("overlap_cpu_optimizer_d2h_h2d", "pin_cpu_grads", "pin_cpu_params"),
    }
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


def fields_of(kind: Any) -> dict[str, Any]:
    """The fields of a configuration of Megatron that settings may set, by name."""
    return {item.name: item for item in dataclasses.fields(kind) if item.name not in WITHOUT_EFFECT}


def as_fields(parsed: dict[str, Any]) -> dict[str, Any]:
    """What Megatron's parser made of flags, by the names of fields, values as JSON has them."""
    named = {RENAMED.get(name, name): _plain(value) for name, value in parsed.items()}
    if "no_persist_layer_norm" in named:
        named["persist_layer_norm"] = not named.pop("no_persist_layer_norm")
    if named.pop("recompute_activations", False):
        named["recompute_granularity"] = "selective"
    if len(named.get("cp_comm_type") or ()) == 1:
        (named["cp_comm_type"],) = named["cp_comm_type"]
    if "overlap_p2p_comm" in named:
        named["batch_p2p_comm"] = not named["overlap_p2p_comm"]
    return named


def has_effect(name: str) -> bool:
    """Whether a setting of this name sets a field."""
    return any(name in fields_of(kind) for kind in KINDS)


def fields_for(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of `settings` that this configuration has, as it wants them: types and kinds for their names."""
    fields = fields_of(kind)
    return {name: _typed(str(fields[name].type), value) for name, value in settings.items() if name in fields}


def _typed(kind: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if "dtype" in kind:
        return _DTYPES.get(value, value)
    if "AttnBackend" in kind:
        from megatron.core.transformer.enums import AttnBackend

        return AttnBackend[value]
    return value


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, enum.Enum) else value
