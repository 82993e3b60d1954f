"""Advantages of mean 0 and variance 1 over the trained tokens of the whole batch, on however many ranks it lies.

Ranks add their moments and then whiten their own tokens; GRPO normalises over a prompt's group instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

VARIANCE_EPSILON = 1e-8


def moments(x_T: Tensor, mask_T: Tensor) -> Tensor:
    """float64 [3]: number, sum and sum of squares of the trained values; ranks that hold other tokens add theirs.

    x_T: [T], anything where masked. mask_T: [T] of 0 and 1.
    """
    trained_T = torch.where(mask_T != 0, x_T, 0.0).double()
    return torch.stack([(mask_T != 0).sum().double(), trained_T.sum(), trained_T.square().sum()])


def mean(moments: Tensor) -> Tensor:
    """float64 [...] from [..., 3]; 0 of no values."""
    return moments[..., 1] / moments[..., 0].clamp(min=1)


def variance(moments: Tensor) -> Tensor:
    """float64 [...] from [..., 3], unbiased (Bessel); 0 of no values and of one."""
    squares = moments[..., 2] - moments[..., 1] * mean(moments)
    return squares.clamp(min=0) / (moments[..., 0] - 1).clamp(min=1)


def whiten(x_T: Tensor, mask_T: Tensor, *, moments: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) at trained tokens, 0 at masked ones. Returns [T] in the type of `x_T`.

    moments: float64 [3] of the whole batch. A batch of one trained token gives 0, and so does a constant one.
    """
    whitened_T = (x_T.double() - mean(moments)) * torch.rsqrt(variance(moments) + VARIANCE_EPSILON)
    return torch.where(mask_T != 0, whitened_T.to(x_T.dtype), 0.0)
