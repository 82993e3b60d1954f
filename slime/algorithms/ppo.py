"""PPO's clipped surrogate (arXiv:1707.06347, eq. 7), with separate clip ranges below and above (arXiv:2503.14476)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClippedLoss(NamedTuple):
    """loss_T: [T], one value a token. clipped_T: [T] bool, where the clipped branch won."""

    loss_T: Tensor
    clipped_T: Tensor


def clipped_policy_loss(
    log_probs_T: Tensor, old_log_probs_T: Tensor, *, advantages_T: Tensor, eps_low: float, eps_high: float
) -> ClippedLoss:
    """max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A) with r = exp(log_probs - old_log_probs), all [T]."""
    ratio_T = torch.exp(log_probs_T - old_log_probs_T)
    unclipped_T = -ratio_T * advantages_T
    clipped_T = -ratio_T.clamp(1 - eps_low, 1 + eps_high) * advantages_T
    return ClippedLoss(torch.maximum(unclipped_T, clipped_T), clipped_T > unclipped_T)
