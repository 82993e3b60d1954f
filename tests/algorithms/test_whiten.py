from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.whiten import moments, whiten

TOKENS = st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=1, max_size=12)


def tensors(tokens: list[tuple[float, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    x_T = torch.tensor([x if trained else math.nan for x, trained in tokens], dtype=torch.float64)
    return x_T, torch.tensor([float(trained) for _, trained in tokens])


@given(tokens=TOKENS)
def test_trained_values_are_whitened_by_their_own_mean_and_sample_variance(tokens: list[tuple[float, bool]]) -> None:
    trained = [x for x, is_trained in tokens if is_trained]
    mean = statistics.fmean(trained) if trained else 0.0
    scale = math.sqrt((statistics.variance(trained) if len(trained) > 1 else 0.0) + 1e-8)
    expected = [(x - mean) / scale if is_trained else 0.0 for x, is_trained in tokens]
    x_T, mask_T = tensors(tokens)
    assert whiten(x_T, mask_T, moments=moments(x_T, mask_T)).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(tokens=TOKENS, cut=st.integers(0, 12))
def test_ranks_that_add_their_moments_whiten_as_one(tokens: list[tuple[float, bool]], cut: int) -> None:
    x_T, mask_T = tensors(tokens)
    parts = [(x_T[:cut], mask_T[:cut]), (x_T[cut:], mask_T[cut:])]
    total = moments(*parts[0]) + moments(*parts[1])
    split = torch.cat([whiten(x, mask, moments=total) for x, mask in parts])
    torch.testing.assert_close(split, whiten(x_T, mask_T, moments=moments(x_T, mask_T)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "mask"),
    [([math.nan, math.inf], [0.0, 0.0]), ([5.0, math.nan], [1.0, 0.0]), ([0.1] * 7, [1.0] * 7), ([], [])],
    ids=["nothing trained", "one token", "constant", "no tokens"],
)
def test_without_spread_the_result_is_zero(x: list[float], mask: list[float]) -> None:
    x_T, mask_T = torch.tensor(x), torch.tensor(mask)
    result = whiten(x_T, mask_T, moments=moments(x_T, mask_T))
    assert result.tolist() == pytest.approx([0.0] * len(x), abs=1e-6)
    assert result.dtype == torch.float32


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    x_T, mask_T = 1e5 + torch.tensor([-1.0, 0.0, 1.0]), torch.ones(3)
    assert whiten(x_T, mask_T, moments=moments(x_T, mask_T)).tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-4)
