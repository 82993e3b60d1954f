"""The critic's loss of PPO, clipped as in OpenAI's baselines (arXiv:2006.05990), and what it explains of the returns.

PPO's paper (arXiv:1707.06347) has the square alone: `value_clip` infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algorithms.ppo import ClippedLoss
from slime.algorithms.whiten import moments, variance


def clipped_value_loss(values_T: Tensor, old_values_T: Tensor, *, returns_T: Tensor, value_clip: float) -> ClippedLoss:
    """max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2), all [T]; no factor 1/2.

    A token has no gradient once its value has moved further than `value_clip` towards the return.
    """
    clipped_values_T = old_values_T + (values_T - old_values_T).clamp(-value_clip, value_clip)
    unclipped_T = (values_T - returns_T) ** 2
    clipped_T = (clipped_values_T - returns_T) ** 2
    return ClippedLoss(torch.maximum(unclipped_T, clipped_T), clipped_T > unclipped_T)


def error_moments(values_T: Tensor, returns_T: Tensor, *, mask_T: Tensor) -> Tensor:
    """float64 [2, 3]: moments of returns minus values, and of returns; ranks that hold other tokens add theirs.

    values_T, returns_T: [T], anything where masked. mask_T: [T] of 0 and 1.
    """
    return torch.stack([moments(returns_T - values_T, mask_T), moments(returns_T, mask_T)])


def explained_variance(error_moments: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), a scalar: 1 for a perfect critic, 0 for a constant one.

    error_moments: [2, 3] of the whole batch. Returns that are all alike leave nothing to explain: 0.
    """
    error, total = variance(error_moments)
    return torch.where(total > 0, 1 - error / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(total))
