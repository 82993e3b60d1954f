"""In what precision a trainer computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slime.config.base import Group, arg, check, check_positive


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Group):
    """Precision: of a trainer's forward and backward; what the optimizer updates is float32."""

    bf16: bool | None = arg(None, "Compute in bfloat16, weights in float32 (default: on GPUs).")
    fp16: bool = arg(
        False,
        "Compute in float16, weights in float32, with a loss scale that halves where a gradient overflows; "
        "such steps are skipped and not counted against --max-skipped-steps.",
    )
    initial_loss_scale: float = arg(65536.0, "Loss scale that --fp16 starts with.")
    loss_scale_window: int = arg(1000, "Steps without an overflow after which the loss scale doubles.")

    def __post_init__(self) -> None:
        check_positive(self, "loss_scale_window")
        scale = self.initial_loss_scale
        check(scale >= 1 and math.log2(scale).is_integer(), "initial_loss_scale", "a power of two, 1 or more", scale)
        check(not (self.fp16 and self.bf16), "bf16", "left out with --fp16", self.bf16)
        super().__post_init__()
