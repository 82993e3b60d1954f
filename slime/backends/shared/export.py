"""The precision in which a trainer hands tensors to engines and files."""

from __future__ import annotations

import torch

# Added to the scores of experts where they are chosen: rounded, it chooses others. Checkpoints and engines hold it so.
_FLOAT32 = ".e_score_correction_bias"


def exported_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """That of the tensor `name`, of floats, in a checkpoint of `dtype`."""
    return torch.float32 if name.endswith(_FLOAT32) else dtype
