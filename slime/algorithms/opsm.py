"""Off-policy sequence masking (DeepSeek-V3.2, arXiv:2512.02556): bad samples that the policy has left are not used.

A clip bounds a token's ratio; this drops whole sequences, and only those that would be pushed down.
"""

from __future__ import annotations

from torch import Tensor

from slime.algorithms.sequences import Sequences


def keep_mask(
    log_probs_T: Tensor, old_log_probs_T: Tensor, *, advantages_T: Tensor, sequences: Sequences, delta: float
) -> Tensor:
    """[T] of 0 and 1, to be multiplied with the loss: 0 where A < 0 and the sequence's KL is above `delta`.

    The KL is the mean of old_log_probs - log_probs over the trained tokens. Without gradient; denominators stay.
    """
    kl_T = sequences.mean(old_log_probs_T - log_probs_T)
    is_dropped_T = (sequences.trained(advantages_T) < 0) & (kl_T > delta)
    return (~is_dropped_T).to(kl_T.dtype)
