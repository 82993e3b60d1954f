"""REINFORCE++ (arXiv:2501.03262): discounted returns of token rewards, whitened over the whole batch, without a critic.

Unlike GRPO the plain form needs no groups: the batch is the baseline (`whiten`). The baseline form subtracts the group
mean first, as GRPO does, but is whitened over the batch and not over the group. Advantages here are not whitened yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algorithms.scan import discounted_suffix_sum, trained_chain


def returns(rewards_T: Tensor, mask_T: Tensor, *, sequence_ids_T: Tensor, gamma: float) -> Tensor:
    """Sum of gamma^k r_{t+k} over the trained tokens from t to the end of the sequence Returns [T].

    rewards_T: [T] of `shaping.token_rewards`. mask_T: [T] of 0 and 1. sequence_ids_T: [T], sorted. Complete sequences.
    0 at masked tokens, so a fully masked sequence gives zeros.
    """
    chain = trained_chain(mask_T, sequence_ids_T)
    returns_N = discounted_suffix_sum(rewards_T[chain.index_N], gamma * chain.has_next_N.to(rewards_T.dtype))
    return torch.zeros_like(rewards_T).index_copy(0, chain.index_N, returns_N)


def baseline_advantages(
    centered_scores_S: Tensor, kl_T: Tensor, *, mask_T: Tensor, sequence_ids_T: Tensor, kl_coef: float
) -> Tensor:
    """The sequence's score minus its group's mean, at every trained token, minus kl_coef * kl_t. Returns [T].

    centered_scores_S: [S] of these sequences, `groups.centered` over the whole rollout. kl_T: [T], anything where
    masked. mask_T: [T] of 0 and 1. sequence_ids_T: [T] in [0, S). 0 at masked tokens.
    """
    return torch.where(mask_T != 0, centered_scores_S[sequence_ids_T] - kl_coef * kl_T, 0.0)
