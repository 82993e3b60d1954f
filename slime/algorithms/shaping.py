"""Rewards a token from one score a sample: a KL penalty at every trained token, the score at the last.

PPO and REINFORCE++ share it. The "last token" is the last trained one: it is found in the mask, so it does not depend
on how the sequence is split among ranks or on what was appended to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algorithms.scan import trained_chain


def token_rewards(scores_S: Tensor, kl_T: Tensor, *, mask_T: Tensor, sequence_ids_T: Tensor, kl_coef: float) -> Tensor:
    """[T] -kl_coef * kl_t, plus the sequence's score at its last trained token (arXiv:2203.02155, section 3.5).

    scores_S: [S] of these sequences. kl_T: [T] estimate of KL(policy || reference); anything where masked.
    mask_T: [T] of 0 and 1. sequence_ids_T: [T] in [0, S), sorted. Complete sequences.
    0 at masked tokens; the score of a fully masked sequence goes nowhere.
    """
    chain = trained_chain(mask_T, sequence_ids_T)
    last = chain.index_N[~chain.has_next_N]
    shaped_T = torch.where(mask_T != 0, -kl_coef * kl_T, 0.0)
    return shaped_T.index_add(0, last, scores_S[sequence_ids_T[last]].to(shaped_T.dtype))
