"""PPO's clipped surrogate (arXiv:1707.06347, eq. 7), with separate clip ranges below and above (arXiv:2503.14476).

Dual clip (arXiv:1912.09729) also bounds the loss of a bad token that has become far likelier.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) is 5e8: a ratio beyond it says nothing, and where it overflows its gradient is 0 * inf = NaN.
MAX_LOG_RATIO = 20.0


class ClippedLoss(NamedTuple):
    """loss_T: [T], one value a token. clipped_T: [T] bool, where the clipped branch won."""

    loss_T: Tensor
    clipped_T: Tensor


def clipped_surrogate(
    log_ratio_T: Tensor, advantages_T: Tensor, *, eps_low: float, eps_high: float, eps_clip_c: float | None = None
) -> ClippedLoss:
    """L = max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A) with r = exp(log_ratio), all [T].

    eps_clip_c: dual clip, above 1: where A < 0, min(L, -eps_clip_c A); None: none.
    """
    ratio_T = torch.exp(log_ratio_T.clamp(max=MAX_LOG_RATIO))
    unclipped_T = -ratio_T * advantages_T
    clipped_T = -ratio_T.clamp(1 - eps_low, 1 + eps_high) * advantages_T
    loss_T = torch.maximum(unclipped_T, clipped_T)
    if eps_clip_c is not None:
        loss_T = torch.where(advantages_T < 0, torch.minimum(loss_T, -eps_clip_c * advantages_T), loss_T)
    return ClippedLoss(loss_T, clipped_T > unclipped_T)


def clipped_policy_loss(
    log_probs_T: Tensor, old_log_probs_T: Tensor, *, advantages_T: Tensor, eps_low: float, eps_high: float
) -> ClippedLoss:
    """The surrogate of r = exp(log_probs - old_log_probs), all [T]."""
    return clipped_surrogate(log_probs_T - old_log_probs_T, advantages_T, eps_low=eps_low, eps_high=eps_high)
