"""Generalised advantage estimation (arXiv:1506.02438), for PPO with a critic.

With lambd = 1 it is the discounted return minus the value; REINFORCE++ is that without the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slime.algorithms.scan import discounted_suffix_sum, shift_left, trained_chain


@dataclass(frozen=True)
class Discount:
    """gamma: of rewards, a trained token. lambd: between the one-step error (0) and the whole return (1)."""

    gamma: float = 1.0
    lambd: float = 1.0


class Estimate(NamedTuple):
    """advantages_T: [T]. returns_T: [T], what the critic should have said. Both 0 at masked tokens."""

    advantages_T: Tensor
    returns_T: Tensor


def gae(rewards_T: Tensor, values_T: Tensor, *, mask_T: Tensor, sequence_ids_T: Tensor, discount: Discount) -> Estimate:
    """A_t = delta_t + gamma lambd A_{t'} with delta_t = r_t + gamma V_{t'} - V_t (eq. 16); returns are A + V.

    t' is the next trained token of the sequence, whatever masked ones lie between; after the last, A and V are 0.
    rewards_T: [T] of `shaping.token_rewards`. values_T: [T] of the critic. Both may hold anything where masked.
    mask_T: [T] of 0 and 1. sequence_ids_T: [T], sorted. Complete sequences.
    """
    chain = trained_chain(mask_T, sequence_ids_T)
    rewards_N, values_N = rewards_T[chain.index_N], values_T[chain.index_N]
    gamma_N = discount.gamma * chain.has_next_N.to(values_T.dtype)
    delta_N = rewards_N + gamma_N * shift_left(values_N) - values_N
    advantages_N = discounted_suffix_sum(delta_N, gamma_N * discount.lambd)
    empty_T = torch.zeros_like(values_T)
    return Estimate(
        empty_T.index_copy(0, chain.index_N, advantages_N),
        empty_T.index_copy(0, chain.index_N, advantages_N + values_N),
    )
