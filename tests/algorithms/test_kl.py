from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.kl import KLType, kl_estimate, unbiased_kl

KINDS: list[KLType] = ["k1", "k2", "k3", "low_var_kl"]
LOG_PROB = st.floats(-30, 0, allow_nan=False)


def oracle(log_prob: float, ref: float, kind: KLType) -> float:
    d = log_prob - ref
    k3 = math.exp(-d) - 1 + d
    return {"k1": d, "k2": d * d / 2, "k3": k3, "low_var_kl": min(k3, 10.0)}[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(pairs=st.lists(st.tuples(LOG_PROB, LOG_PROB), min_size=1, max_size=8))
def test_estimates_equal_their_formulas(kind: KLType, pairs: list[tuple[float, float]]) -> None:
    log_probs, refs = torch.tensor(pairs, dtype=torch.float64).T
    expected = torch.tensor([oracle(a, b, kind) for a, b in pairs], dtype=torch.float64)
    torch.testing.assert_close(kl_estimate(log_probs, refs, kind), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["k2", "k3", "low_var_kl"])
@given(pairs=st.lists(st.tuples(LOG_PROB, LOG_PROB), min_size=1, max_size=8))
def test_all_but_k1_are_never_negative_in_float32(kind: KLType, pairs: list[tuple[float, float]]) -> None:
    log_probs, refs = torch.tensor(pairs, dtype=torch.float32).T
    assert (kl_estimate(log_probs, refs, kind) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formulas(kind: KLType) -> None:
    log_probs = torch.tensor([-1.0, -2.5, -0.1, -5.0], dtype=torch.float64, requires_grad=True)
    refs = torch.tensor([-1.2, -0.5, -3.0, -1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: kl_estimate(values, refs, kind), (log_probs,))


def test_k1_and_k3_are_unbiased() -> None:
    policy = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    kl = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl_estimate(policy, reference, kind)).sum(), kl)


def test_low_var_kl_has_a_finite_gradient_however_far_the_reference_is() -> None:
    log_probs = torch.tensor([-200.0, -0.0, -15.0], requires_grad=True)
    values = kl_estimate(log_probs, torch.tensor([-1.0, -300.0, -1.0]), "low_var_kl")
    assert values.tolist() == [10.0, 10.0, 10.0]
    values.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_weighted_estimate_has_the_value_and_gradient_of_the_current_policys_kl(kind: KLType) -> None:
    old = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64).log()
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    logits = torch.tensor([0.3, -0.2, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    weighted = unbiased_kl(kl_estimate(policy, reference, kind), policy, old_log_probs_T=old)
    expected_value = (old.exp() * weighted).sum()
    torch.testing.assert_close(expected_value, exact)
    (gradient,) = torch.autograd.grad(expected_value, logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, logits)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_weighted_gradient_equals_finite_differences(kind: KLType) -> None:
    log_probs = torch.tensor([-1.0, -2.5, -0.1, -4.0], dtype=torch.float64, requires_grad=True)
    refs = torch.tensor([-1.2, -0.5, -3.0, -2.0], dtype=torch.float64)
    old = torch.tensor([-1.5, -2.0, -0.4, -3.0], dtype=torch.float64)

    def weighted(values: torch.Tensor) -> torch.Tensor:
        return unbiased_kl(kl_estimate(values, refs, kind), values, old_log_probs_T=old)

    assert torch.autograd.gradcheck(weighted, (log_probs,))


def test_a_weight_that_would_overflow_leaves_value_and_gradient_finite() -> None:
    log_probs = torch.tensor([0.0, -1.0], requires_grad=True)
    kl = kl_estimate(log_probs, log_probs.detach(), "k3")
    weighted = unbiased_kl(kl, log_probs, old_log_probs_T=torch.tensor([-500.0, 500.0]))
    weighted.sum().backward()
    assert log_probs.grad is not None
    assert weighted.tolist() == [0.0, 0.0] and log_probs.grad.tolist() == [0.0, 0.0]
