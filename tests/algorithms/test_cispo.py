from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.cispo import cispo_loss

TOKENS = st.lists(st.tuples(st.floats(-2, 2), st.floats(-4, 0), st.floats(-3, 3)), min_size=1, max_size=8)


@given(tokens=TOKENS)
def test_loss_and_gradient_equal_a_loop_over_tokens(tokens: list[tuple[float, float, float]]) -> None:
    log_ratio_T, log_probs_T, advantages_T = torch.tensor(tokens, dtype=torch.float64).T
    log_probs_T = log_probs_T.clone().requires_grad_()
    old_T = (log_probs_T - log_ratio_T).detach()
    result = cispo_loss(log_probs_T, old_T, advantages_T=advantages_T, eps_low=0.8, eps_high=0.5)
    result.loss_T.sum().backward()
    weights = [min(max(math.exp(log_ratio), 0.2), 1.5) for log_ratio, _, _ in tokens]
    losses = [-w * advantage * log_prob for w, (_, log_prob, advantage) in zip(weights, tokens, strict=True)]
    assert log_probs_T.grad is not None
    assert result.loss_T.tolist() == pytest.approx(losses)
    assert log_probs_T.grad.tolist() == pytest.approx([-w * a for w, (_, _, a) in zip(weights, tokens, strict=True)])


def test_gradient_equals_finite_differences_where_the_weight_is_a_constant() -> None:
    log_probs_T = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    old_T, advantages_T = torch.full((3,), -9.0, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5]).double()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return cispo_loss(values, old_T, advantages_T=advantages_T, eps_low=1.0, eps_high=0.5).loss_T

    assert torch.autograd.gradcheck(loss, (log_probs_T,))


def test_a_clipped_token_keeps_its_gradient_where_ppo_has_none() -> None:
    log_probs_T = torch.tensor([0.0, 0.0, -500.0, 0.0], requires_grad=True)
    old_T = torch.tensor([-1.0, -500.0, 0.0, 0.0])
    result = cispo_loss(log_probs_T, old_T, advantages_T=torch.ones(4), eps_low=1.0, eps_high=0.2)
    result.loss_T.sum().backward()
    assert log_probs_T.grad is not None
    assert log_probs_T.grad.tolist() == pytest.approx([-1.2, -1.2, 0.0, -1.0])
    assert result.clipped_T.tolist() == [True, True, False, False]
