"""CISPO (MiniMax-M1, arXiv:2506.13585): clips the importance weight and not the update.

PPO's clip gives a token beyond the range no gradient at all; here every token keeps its gradient, of a bounded weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algorithms.ppo import ClippedLoss


def cispo_loss(
    log_probs_T: Tensor, old_log_probs_T: Tensor, *, advantages_T: Tensor, eps_low: float, eps_high: float
) -> ClippedLoss:
    """-sg(clip(r, 1 - eps_low, 1 + eps_high)) A log_probs with r = exp(log_probs - old_log_probs) (eq. 4), all [T].

    The paper bounds only above: eps_low >= 1. clipped_T: where the ratio lies outside the range.
    """
    ratio_T = torch.exp((log_probs_T - old_log_probs_T).detach())
    weights_T = ratio_T.clamp(1 - eps_low, 1 + eps_high)
    return ClippedLoss(-weights_T * advantages_T * log_probs_T, weights_T != ratio_T)
