"""Settings that only the FSDP backend knows."""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.base import Group, arg


@dataclass(frozen=True, kw_only=True)
class FSDPConfig(Group):
    """FSDP: precision, attention and memory of the FSDP2 backend."""

    attn_implementation: str = arg(
        "packed",
        "Attention: packed (variable-length, exact), or a name that transformers knows, such as flash_attention_2.",
    )
    share_prompts: bool = arg(
        True, "Compute a prompt once for the samples of a micro-batch that share it (with packed attention)."
    )
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass.")
    torch_compile: bool | None = arg(
        None,
        "Compile each layer with torch.compile; the first step takes some 15 s more (default: on GPUs).",
    )
    bf16: bool | None = arg(None, "Compute in bfloat16, weights in float32 (default: on GPUs).")
    deterministic_mode: bool = arg(False, "Deterministic kernels only.")
