"""GSPO (arXiv:2507.18071): PPO whose ratio belongs to the sequence, as the reward does, and not to the token.

All tokens of a sequence share the geometric mean of their ratios, so they are clipped together or not at all; clip
ranges are therefore much narrower than PPO's (the paper: 3e-4 and 4e-4).
"""

from __future__ import annotations

from torch import Tensor

from slime.algorithms.sequences import Sequences


def sequence_log_ratio(log_probs_T: Tensor, old_log_probs_T: Tensor, *, sequences: Sequences) -> Tensor:
    """[T] for `ppo.clipped_surrogate`: the mean over its sequence's trained tokens of log_probs - old_log_probs.

    The gradient is that of the token's own log-prob (GSPO-token, section 4.3). Where the trained tokens of a sequence
    have one advantage and one weight, as any mean of `reduce` gives them, the loss has the very gradient of GSPO, and
    context-parallel ranks need not talk in the backward pass. 0 at masked tokens.
    """
    mean_T = sequences.mean(log_probs_T - old_log_probs_T)
    return sequences.trained(mean_T + (log_probs_T - log_probs_T.detach()))
