"""Settings that only the FSDP backend knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from slime.config.base import ConfigError, Group, arg

_SEPARATE_LAYERS = {"full_attention", "sliding_attention"}  # in which tokens meet in attention alone
_ROPE_OF_THE_LONGEST = {"dynamic", "longrope"}  # rotations that depend on the longest sample, which a rank does not see


@dataclass(frozen=True, kw_only=True)
class FSDPConfig(Group):
    """FSDP: attention and memory of the FSDP2 backend."""

    attn_implementation: str = arg(
        "packed",
        "Attention: packed (variable-length, exact), or a name that transformers knows, such as flash_attention_2.",
    )
    experts_implementation: str | None = arg(
        None,
        "How experts compute: eager, or a name that transformers knows (default: grouped_mm, one kernel for all).",
    )
    share_prompts: bool = arg(
        True, "Compute a prompt once for the samples of a micro-batch that share it (with packed attention)."
    )
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass.")
    torch_compile: bool | None = arg(
        None,
        "Compile each layer with torch.compile; the first step takes some 15 s more (default: on GPUs, with FSDP).",
    )
    fsdp_cpu_offload: bool = arg(
        False,
        "Parameters, gradients and optimizer stay on the host, where the optimizer steps; for lack of GPU memory.",
    )
    fsdp_cpu_backend: Literal["gloo", "mpi"] = arg(
        "gloo", "What ranks talk through about tensors on the host, with --fsdp-cpu-offload on GPUs."
    )
    fsdp_reshard_after_forward: bool = arg(
        True, "Free the gathered weights of a layer after its forward; off: more memory, one gathering less."
    )
    offload_ref: bool = arg(
        False, "Reference, teacher and old actor wait in page-locked host memory while they are not used."
    )
    deterministic_mode: bool = arg(False, "Deterministic kernels only.")


def check_packable(config: dict[str, Any]) -> None:
    """Raise ConfigError where layers of the model of `config` would mix the samples of a pack.

    config: config.json, its text part.
    """
    if others := sorted(set(config.get("layer_types") or ()) - _SEPARATE_LAYERS):
        raise ConfigError(f"the model has layers of type {others[0]}, which would mix the samples of a micro-batch.")


def check_context_parallel(size: int, fsdp: FSDPConfig, config: dict[str, Any]) -> None:
    """Raise ConfigError where --context-parallel-size `size` cannot share the tokens of the model of `config`.

    config: config.json, its text part.
    """
    if size == 1:
        return
    flag = f"--context-parallel-size {size}"
    if fsdp.attn_implementation != "packed":
        raise ConfigError(f"{flag} needs --attn-implementation packed, got {fsdp.attn_implementation!r}.")
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads % size:
        raise ConfigError(f"{flag} must divide the query heads of the model, got {heads} heads.")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type"))) in _ROPE_OF_THE_LONGEST:
        raise ConfigError(f"{flag}: the model rotates positions by the longest sample ({kind}): use 1.")
