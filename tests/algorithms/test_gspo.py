from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slime.algorithms.gspo import sequence_log_ratio
from slime.algorithms.ppo import clipped_surrogate
from slime.algorithms.reduce import constant_weights, per_sample_weights, per_token_weights
from slime.algorithms.sequences import Sequences

EPS = 0.1
# (log ratio, trained) of each token, and the advantage, of each sequence
SEQUENCE = st.tuples(st.lists(st.tuples(st.floats(-1, 1), st.booleans()), min_size=1, max_size=6), st.floats(-2, 2))
BATCH = list[tuple[list[tuple[float, bool]], float]]


def loss_of(
    log_probs_T: Tensor, old_T: Tensor, mask_T: Tensor, ids_T: Tensor, advantages_T: Tensor
) -> tuple[Tensor, Tensor]:
    def sequence_sum(x_T: Tensor) -> Tensor:
        return torch.zeros(int(ids_T.max()) + 1, dtype=x_T.dtype).index_add(0, ids_T, x_T)

    log_ratio_T = sequence_log_ratio(log_probs_T, old_T, sequences=Sequences(mask_T, ids_T, sequence_sum))
    return clipped_surrogate(log_ratio_T, advantages_T, eps_low=EPS, eps_high=EPS)


@pytest.mark.parametrize("reduction", ["sample", "token", "constant"])
@given(batch=st.lists(SEQUENCE, min_size=1, max_size=5))
def test_loss_and_gradient_equal_gspo_written_out_a_sequence_at_a_time(reduction: str, batch: BATCH) -> None:
    """The oracle differentiates the sequence's ratio itself, through the mean of its log-probs."""
    log_ratio_T = torch.tensor([x for tokens, _ in batch for x, _ in tokens], dtype=torch.float64)
    mask_T = torch.tensor([float(m) for tokens, _ in batch for _, m in tokens], dtype=torch.float64)
    ids_T = torch.tensor([index for index, (tokens, _) in enumerate(batch) for _ in tokens])
    weights_T = {
        "sample": per_sample_weights(mask_T, ids_T, len(batch)),
        "token": per_token_weights(mask_T),
        "constant": constant_weights(mask_T, len(batch), max_length=6),
    }[reduction]
    old_T = torch.linspace(-3, -0.5, len(mask_T), dtype=torch.float64)
    log_probs_T = (old_T + log_ratio_T).requires_grad_()
    advantages_T = torch.tensor([a for _, a in batch], dtype=torch.float64)[ids_T]

    result = loss_of(log_probs_T, old_T, mask_T, ids_T, advantages_T)
    loss = (weights_T * result[0]).sum()
    expected = (log_probs_T * 0).sum()
    for index, (_, advantage) in enumerate(batch):
        trained = (ids_T == index) & (mask_T != 0)
        if trained.any():
            ratio = (log_probs_T[trained] - old_T[trained]).mean().exp()
            surrogate = torch.min(ratio * advantage, ratio.clamp(1 - EPS, 1 + EPS) * advantage)
            expected = expected - weights_T[trained].sum() * surrogate
    torch.testing.assert_close(loss, expected)
    (gradient_T,) = torch.autograd.grad(loss, log_probs_T)
    torch.testing.assert_close(gradient_T, torch.autograd.grad(expected, log_probs_T)[0])


def test_the_gradient_of_the_mean_equals_finite_differences() -> None:
    ids_T, mask_T = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([1.0, 0, 1, 1, 0, 0], dtype=torch.float64)
    old_T = torch.tensor([-1.0, -2, -0.5, -3, -1, -1], dtype=torch.float64)
    log_probs_T = (old_T + torch.tensor([0.1, 0.9, -0.15, 0.3, 1, 1], dtype=torch.float64)).requires_grad_()
    advantages_T = torch.tensor([1.0, 1, 1, -2, 5, 5], dtype=torch.float64)
    weights_T = per_sample_weights(mask_T, ids_T, 3)

    def loss(values: Tensor) -> Tensor:
        return (weights_T * loss_of(values, old_T, mask_T, ids_T, advantages_T)[0]).sum()

    assert torch.autograd.gradcheck(loss, (log_probs_T,))


def test_tokens_of_a_sequence_are_clipped_together_where_ppo_clips_one() -> None:
    ids_T, mask_T, old_T = torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3)
    log_probs_T, advantages_T = torch.tensor([math.log(1.5), 0.0, 0.0]), torch.ones(3)
    ppo = clipped_surrogate(log_probs_T - old_T, advantages_T, eps_low=EPS, eps_high=EPS)
    assert ppo.clipped_T.tolist() == [True, False, False]
    assert loss_of(log_probs_T, old_T, mask_T, ids_T, advantages_T)[1].tolist() == [True] * 3


def test_a_sequence_of_one_token_is_ppo() -> None:
    ids_T, mask_T, old_T = torch.arange(4), torch.ones(4), torch.zeros(4)
    log_probs_T, advantages_T = torch.tensor([0.5, -0.5, 0.05, 0.5]), torch.tensor([1.0, -1.0, 2.0, -1.0])
    ppo = clipped_surrogate(log_probs_T - old_T, advantages_T, eps_low=EPS, eps_high=EPS)
    torch.testing.assert_close(loss_of(log_probs_T, old_T, mask_T, ids_T, advantages_T)[0], ppo.loss_T)
