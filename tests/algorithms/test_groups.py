from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.groups import centered, group_sizes, group_sums, is_constant

SAMPLES = st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(-3, 3)), max_size=12)


def tensors(samples: list[tuple[float, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = [value for value, _ in samples], [group for _, group in samples]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(ids, dtype=torch.int64)


@given(samples=SAMPLES)
def test_each_sample_sees_the_sum_size_and_mean_of_its_group(samples: list[tuple[float, int]]) -> None:
    values_S, ids_S = tensors(samples)
    members = [[value for value, other in samples if other == group] for _, group in samples]
    assert group_sums(values_S, ids_S).tolist() == pytest.approx([sum(group) for group in members])
    assert group_sizes(values_S, ids_S).tolist() == [len(group) for group in members]
    assert is_constant(values_S, ids_S).tolist() == [len(set(group)) == 1 for group in members]
    means = [sum(group) / len(group) for group in members]
    expected = [value - mean for (value, _), mean in zip(samples, means, strict=True)]
    assert centered(values_S, ids_S).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -7.7])
def test_a_constant_group_is_centered_to_exactly_zero(value: float) -> None:
    values_S = torch.tensor([value] * 7 + [1.0])
    assert centered(values_S, torch.tensor([4] * 7 + [2])).tolist() == [0.0] * 8
