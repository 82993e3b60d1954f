"""Estimators of KL(policy || reference) from log-probs of sampled tokens (Schulman, "Approximating KL divergence")."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from slime.algorithms.ppo import MAX_LOG_RATIO

KLType = Literal["k1", "k2", "k3", "low_var_kl"]


def kl_estimate(log_probs_T: Tensor, ref_log_probs_T: Tensor, kind: KLType) -> Tensor:
    """Per-token estimate [T] with d = log_probs - ref_log_probs.

    k1: d, unbiased, may be negative. k2: d^2 / 2, biased, low variance. k3: exp(-d) - 1 + d, unbiased, never negative.
    low_var_kl: k3 clamped to at most 10.
    """
    d = log_probs_T - ref_log_probs_T
    if kind == "low_var_kl":
        d = d.clamp(-20, 20)  # beyond, k3 is above 10 anyway; unclamped, exp overflows and its gradient is NaN
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    k3 = torch.expm1(-d) + d
    return k3 if kind == "k3" else k3.clamp(max=10)


def unbiased_kl(kl_T: Tensor, log_probs_T: Tensor, *, old_log_probs_T: Tensor) -> Tensor:
    """kl_T times exp(log_probs - old_log_probs), all [T] (DeepSeek-V3.2, arXiv:2512.02556, section 3.1).

    Tokens are the old policy's; the weight makes k1 and k3 estimates of the current policy's KL. It keeps its gradient,
    so the gradient is that KL's too. Of the plain estimates only k2 has it, and only while the policy has not moved.
    """
    log_ratio_T = (log_probs_T - old_log_probs_T).clamp(max=MAX_LOG_RATIO)
    return torch.exp(log_ratio_T) * kl_T
