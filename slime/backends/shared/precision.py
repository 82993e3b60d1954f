"""What a trainer computes in."""

from __future__ import annotations

import torch

from slime.config.precision import PrecisionConfig


def compute_dtype(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """Of parameters in forward and backward: half precision where asked for, bfloat16 by default on GPUs."""
    if precision.fp16:
        return torch.float16
    wants_bf16 = device.type == "cuda" if precision.bf16 is None else precision.bf16
    return torch.bfloat16 if wants_bf16 else torch.float32
