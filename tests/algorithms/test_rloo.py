from __future__ import annotations

import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms import grpo, rloo

GROUPS = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6), min_size=1, max_size=5)


def tensors(groups: list[list[float]], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and group ids, shuffled."""
    samples = [(reward, 31 * index - 7) for index, group in enumerate(groups) for reward in group]
    random.Random(seed).shuffle(samples)
    return torch.tensor([r for r, _ in samples], dtype=torch.float64), torch.tensor([g for _, g in samples])


@given(groups=GROUPS, seed=st.integers(0, 99))
def test_the_baseline_is_the_mean_of_the_other_samples(groups: list[list[float]], seed: int) -> None:
    rewards_S, ids_S = tensors(groups, seed)
    expected = []
    for place, (reward, group) in enumerate(zip(rewards_S.tolist(), ids_S.tolist(), strict=True)):
        others = [float(rewards_S[i]) for i in range(len(ids_S)) if i != place and ids_S[i] == group]
        expected.append(reward - statistics.fmean(others) if others else 0.0)
    assert rloo.advantages(rewards_S, ids_S).tolist() == pytest.approx(expected, abs=1e-9)


def test_it_is_grpo_without_std_times_the_size_over_the_number_of_others() -> None:
    rewards_S, ids_S = torch.tensor([1.0, 0, 0, 5, 3]), torch.tensor([0, 0, 0, 1, 1])
    factor_S = torch.tensor([3 / 2] * 3 + [2.0] * 2)
    expected = factor_S * grpo.advantages(rewards_S, ids_S, std_normalize=False)
    torch.testing.assert_close(rloo.advantages(rewards_S, ids_S), expected)


@pytest.mark.parametrize("rewards", [[0.1] * 7, [5.0], []])
def test_constant_groups_groups_of_one_and_no_samples_give_zeros(rewards: list[float]) -> None:
    result = rloo.advantages(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.int64))
    assert result.tolist() == [0.0] * len(rewards)
