from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.scan import discounted_suffix_sum, shift_left, trained_chain

STEPS = st.lists(st.tuples(st.floats(-10, 10), st.sampled_from([0.0, 0.5, 0.99, 1.0])), max_size=40)


@given(steps=STEPS)
def test_suffix_sums_equal_a_loop_from_the_right(steps: list[tuple[float, float]]) -> None:
    expected: list[float] = []
    following = 0.0
    for value, decay in reversed(steps):
        following = value + decay * following
        expected.insert(0, following)
    values_N = torch.tensor([value for value, _ in steps], dtype=torch.float64)
    decay_N = torch.tensor([decay for _, decay in steps], dtype=torch.float64)
    assert discounted_suffix_sum(values_N, decay_N).tolist() == pytest.approx(expected, abs=1e-9)


def test_ten_thousand_steps_of_float32_err_by_less_than_1e_4_of_their_scale() -> None:
    values_N = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    decay_N = torch.full_like(values_N, 0.999)
    exact = discounted_suffix_sum(values_N.double(), decay_N.double())
    error_N = discounted_suffix_sum(values_N, decay_N).double() - exact
    assert error_N.abs().max() < 1e-4 * exact.std()


def test_the_chain_holds_trained_tokens_and_ends_with_each_sequence() -> None:
    mask_T, ids_T = torch.tensor([1.0, 0, 1, 0, 1, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    chain = trained_chain(mask_T, ids_T)
    assert chain.index_N.tolist() == [0, 2, 4]
    assert chain.has_next_N.tolist() == [True, False, False]


def test_shifting_beyond_the_end_gives_zeros() -> None:
    assert shift_left(torch.tensor([1.0, 2, 3])).tolist() == [2, 3, 0]
    assert shift_left(torch.tensor([1.0, 2, 3]), by=2).tolist() == [3, 0, 0]


def test_an_empty_chain_is_no_special_case() -> None:
    chain = trained_chain(torch.zeros(3), torch.tensor([0, 0, 1]))
    assert len(chain.index_N) == len(chain.has_next_N) == 0
    assert len(discounted_suffix_sum(torch.zeros(0), torch.zeros(0))) == 0
