from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.ppo import clipped_policy_loss, clipped_surrogate

EPS_LOW, EPS_HIGH = 0.2, 0.3
TOKENS = st.lists(
    st.tuples(st.floats(-2, 2, allow_nan=False), st.floats(-3, 3, allow_nan=False)), min_size=1, max_size=8
)


def oracle(log_ratio: float, advantage: float) -> tuple[float, bool]:
    """Loss and whether it was clipped, in terms of the objective that PPO maximises."""
    ratio = math.exp(log_ratio)
    bounded = min(max(ratio, 1 - EPS_LOW), 1 + EPS_HIGH)
    return -min(ratio * advantage, bounded * advantage), bounded * advantage < ratio * advantage


@given(tokens=TOKENS)
def test_loss_and_clipping_equal_a_loop_over_tokens(tokens: list[tuple[float, float]]) -> None:
    log_ratios, advantages = torch.tensor(tokens, dtype=torch.float64).T
    old = torch.linspace(-3, -0.5, len(tokens), dtype=torch.float64)
    result = clipped_policy_loss(old + log_ratios, old, advantages_T=advantages, eps_low=EPS_LOW, eps_high=EPS_HIGH)
    expected = [
        oracle(float(new - before), a) for new, before, (_, a) in zip(old + log_ratios, old, tokens, strict=True)
    ]
    torch.testing.assert_close(result.loss_T, torch.tensor([loss for loss, _ in expected], dtype=torch.float64))
    assert result.clipped_T.tolist() == [clipped for _, clipped in expected]


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 2.0, -2.0),  # at the old policy: the plain policy gradient
        (1.5, 2.0, 0.0),  # good and already likelier than 1 + eps_high: no push
        (0.5, 2.0, -1.0),  # good and less likely: pushed up, scaled by the ratio
        (0.5, -2.0, 0.0),  # bad and already less likely than 1 - eps_low: no push
        (1.5, -2.0, 3.0),  # bad and likelier: pushed down, unbounded
        (1.0, 0.0, 0.0),
    ],
)
def test_gradient_by_side_of_the_clip_range_and_sign_of_the_advantage(
    ratio: float, advantage: float, gradient: float
) -> None:
    log_probs = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    result = clipped_policy_loss(
        log_probs,
        torch.tensor([-1.0], dtype=torch.float64),
        advantages_T=torch.tensor([advantage], dtype=torch.float64),
        eps_low=EPS_LOW,
        eps_high=EPS_HIGH,
    )
    result.loss_T.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(gradient)


def test_gradient_equals_finite_differences_off_the_kinks() -> None:
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64)
    log_probs = (old + torch.tensor([0.1, -0.5, 0.6, -0.05], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, 1.5, -0.7, -2.0], dtype=torch.float64)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return clipped_policy_loss(values, old, advantages_T=advantages, eps_low=0.2, eps_high=0.3).loss_T

    assert torch.autograd.gradcheck(loss, (log_probs,))


@given(tokens=TOKENS, eps_clip_c=st.sampled_from([1.5, 3.0]))
def test_dual_clip_bounds_the_loss_of_bad_tokens_only(tokens: list[tuple[float, float]], eps_clip_c: float) -> None:
    log_ratios, advantages = torch.tensor(tokens, dtype=torch.float64).T
    result = clipped_surrogate(log_ratios, advantages, eps_low=EPS_LOW, eps_high=EPS_HIGH, eps_clip_c=eps_clip_c)
    expected = []
    for log_ratio, advantage in tokens:
        objective = -oracle(log_ratio, advantage)[0]
        expected.append(-max(objective, eps_clip_c * advantage) if advantage < 0 else -objective)
    torch.testing.assert_close(result.loss_T, torch.tensor(expected, dtype=torch.float64))


def test_dual_clip_has_the_gradient_of_finite_differences_and_none_beyond_its_bound() -> None:
    log_ratios = torch.tensor([0.1, 0.5, 2.0, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.5, -0.7, 2.0], dtype=torch.float64)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return clipped_surrogate(values, advantages, eps_low=0.2, eps_high=0.3, eps_clip_c=3.0).loss_T

    assert torch.autograd.gradcheck(loss, (log_ratios,))
    loss(log_ratios).sum().backward()
    assert log_ratios.grad is not None
    assert log_ratios.grad[2] == 0


@pytest.mark.parametrize("eps_clip_c", [None, 3.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("log_ratio", [-500.0, 500.0])
def test_a_ratio_that_would_overflow_leaves_loss_and_gradient_finite(
    log_ratio: float, advantage: float, eps_clip_c: float | None
) -> None:
    log_ratios = torch.tensor([log_ratio], requires_grad=True)
    result = clipped_surrogate(
        log_ratios, torch.tensor([advantage]), eps_low=EPS_LOW, eps_high=EPS_HIGH, eps_clip_c=eps_clip_c
    )
    result.loss_T.sum().backward()
    assert log_ratios.grad is not None
    assert result.loss_T.isfinite().all() and log_ratios.grad.isfinite().all()
