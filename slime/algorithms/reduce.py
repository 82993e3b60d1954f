"""From per-token values to one number: weights that are known before the first micro-batch.

A loss is `(weights_T * loss_T).sum()`. Over all micro-batches and ranks of one optimizer step the weights of a mean add
up to 1, so shares of a step are added and nobody divides by a count of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# [T] -> [S]: sums over each sequence; a context-parallel backend adds the other ranks' tokens.
SequenceSum = Callable[[Tensor], Tensor]


def per_token_weights(loss_mask_T: Tensor) -> Tensor:
    """Mean over all trained tokens: sum_i(sum_t x_it) / sum_i(len_i). loss_mask_T: [T] of 0 and 1, the whole step's."""
    return loss_mask_T / loss_mask_T.sum().clamp(min=1)


def per_sample_weights(loss_mask_T: Tensor, sample_ids_T: Tensor, num_samples: int) -> Tensor:
    """Mean over samples of the mean over their tokens: mean_i(sum_t x_it / len_i).

    loss_mask_T: [T] of 0 and 1, the whole step's. sample_ids_T: [T] in [0, num_samples).
    A sample without trained tokens adds nothing and still counts in the mean.
    """
    zeros = torch.zeros(num_samples, dtype=loss_mask_T.dtype, device=loss_mask_T.device)
    length_S = zeros.index_add(0, sample_ids_T, loss_mask_T)
    return loss_mask_T / (length_S.clamp(min=1)[sample_ids_T] * num_samples)


def per_rollout_weights(loss_mask_T: Tensor, sample_ids_T: Tensor, *, rollout_ids_S: Tensor) -> Tensor:
    """Mean over rollouts of the mean over the tokens of all their samples: siblings of a fan-out count as one.

    loss_mask_T: [T] of 0 and 1, the whole step's. sample_ids_T: [T] in [0, S). rollout_ids_S: [S], equal for siblings.
    With one sample a rollout it is `per_sample_weights`. A rollout without trained tokens still counts in the mean.
    """
    unique, rollout_S = torch.unique(rollout_ids_S, return_inverse=True)
    return per_sample_weights(loss_mask_T, rollout_S[sample_ids_T], len(unique))


def constant_weights(loss_mask_T: Tensor, num_samples: int, *, max_length: int) -> Tensor:
    """Sum over tokens over a constant: sum_i(sum_t x_it) / (num_samples * max_length) (Dr. GRPO, arXiv:2503.20783).

    loss_mask_T: [T] of 0 and 1. num_samples: of the whole step. max_length: the longest response that is allowed.
    """
    return loss_mask_T / (num_samples * max_length)
