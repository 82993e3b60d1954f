from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.value import clipped_value_loss, error_moments, explained_variance

VALUE = st.floats(-5, 5, width=32)


@given(tokens=st.lists(st.tuples(VALUE, VALUE, VALUE), min_size=1, max_size=8), clip=st.sampled_from([0.1, 0.2, 3.0]))
def test_loss_and_clipping_equal_a_loop_over_tokens(tokens: list[tuple[float, float, float]], clip: float) -> None:
    values_T, old_T, returns_T = torch.tensor(tokens, dtype=torch.float64).T
    result = clipped_value_loss(values_T, old_T, returns_T=returns_T, value_clip=clip)
    losses = []
    for value, old, target in tokens:
        bounded = min(max(value, old - clip), old + clip)
        losses.append(max((value - target) ** 2, (bounded - target) ** 2))
    assert result.loss_T.tolist() == pytest.approx(losses)
    is_larger = [loss > (value - target) ** 2 + 1e-9 for loss, (value, _, target) in zip(losses, tokens, strict=True)]
    assert (result.clipped_T | ~torch.tensor(is_larger)).all()


@pytest.mark.parametrize(
    ("value", "gradient"),
    [
        (0.1, 2 * (0.1 - 1)),  # within the range: the plain square
        (0.5, 0.0),  # moved towards the return beyond the range: no gradient
        (-0.5, 2 * (-0.5 - 1)),  # moved away from it: pulled back
        (1.5, 0.0),  # overshot, and still nearer to the return than the clipped value
        (2.0, 2 * (2.0 - 1)),  # overshot by more
    ],
)
def test_gradient_by_where_the_value_stands(value: float, gradient: float) -> None:
    values_T = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old_T, returns_T = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    clipped_value_loss(values_T, old_T, returns_T=returns_T, value_clip=0.2).loss_T.sum().backward()
    assert values_T.grad is not None
    assert values_T.grad.item() == pytest.approx(gradient)


def test_gradient_equals_finite_differences_off_the_kinks() -> None:
    old_T = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    values_T = (old_T + torch.tensor([0.1, 0.5, -0.4, -0.05], dtype=torch.float64)).requires_grad_()
    returns_T = torch.tensor([1.0, 3.0, 1.0, 2.5], dtype=torch.float64)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return clipped_value_loss(values, old_T, returns_T=returns_T, value_clip=0.2).loss_T

    assert torch.autograd.gradcheck(loss, (values_T,))


@given(tokens=st.lists(st.tuples(VALUE, VALUE, st.booleans()), min_size=3, max_size=9), cut=st.integers(0, 9))
def test_explained_variance_adds_up_over_ranks_and_sees_trained_tokens_only(
    tokens: list[tuple[float, float, bool]], cut: int
) -> None:
    trained = [(value, target) for value, target, is_trained in tokens if is_trained]
    total = statistics.variance([target for _, target in trained]) if len(trained) > 1 else 0.0
    if 0 < total < 1e-3:
        return  # ill-conditioned: a ratio of roundings
    errors = [target - value for value, target in trained]
    expected = 1 - statistics.variance(errors) / total if total else 0.0
    values_T = torch.tensor([v if m else math.nan for v, _, m in tokens], dtype=torch.float64)
    returns_T = torch.tensor([r for _, r, _ in tokens], dtype=torch.float64)
    mask_T = torch.tensor([float(m) for _, _, m in tokens])
    parts = [slice(None, cut), slice(cut, None)]
    summed = sum(error_moments(values_T[p], returns_T[p], mask_T=mask_T[p]) for p in parts)
    assert isinstance(summed, torch.Tensor)
    assert explained_variance(summed).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_perfect_critic_explains_all_and_a_constant_one_nothing() -> None:
    returns_T, mask_T = torch.tensor([0.0, 1.0, 3.0]), torch.ones(3)
    assert explained_variance(error_moments(returns_T, returns_T, mask_T=mask_T)) == 1
    assert explained_variance(error_moments(torch.full((3,), 7.0), returns_T, mask_T=mask_T)).item() == pytest.approx(0)
    assert explained_variance(error_moments(returns_T, torch.ones(3), mask_T=mask_T)) == 0
