from __future__ import annotations

import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms import grpo

FINITE = st.floats(-10, 10, allow_nan=False, width=32)
GROUPS = st.lists(st.lists(FINITE, min_size=1, max_size=6), min_size=1, max_size=5)


def oracle(rewards: list[float], groups: list[int], *, std_normalize: bool) -> list[float]:
    """A loop over samples with the standard library's mean and stdev, in float64."""
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        if len(set(members)) == 1:
            result.append(0.0)
            continue
        centered = reward - statistics.fmean(members)
        result.append(centered / (statistics.stdev(members) + 1e-6) if std_normalize else centered)
    return result


def flat(groups: list[list[float]]) -> tuple[list[float], list[int]]:
    """Rewards and group ids; ids are neither small nor sorted."""
    rewards = [reward for group in groups for reward in group]
    return rewards, [7919 * (index + 1) % 1009 for index, group in enumerate(groups) for _ in group]


def advantages(
    rewards: list[float], groups: list[int], *, std: bool, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return grpo.advantages(torch.tensor(rewards, dtype=dtype), torch.tensor(groups), std_normalize=std)


@pytest.mark.parametrize("std_normalize", [False, True])
@given(groups=GROUPS)
def test_advantages_equal_a_loop_over_samples(std_normalize: bool, groups: list[list[float]]) -> None:
    rewards, ids = flat(groups)
    expected = oracle(rewards, ids, std_normalize=std_normalize)
    torch.testing.assert_close(
        advantages(rewards, ids, std=std_normalize), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@given(groups=GROUPS, seed=st.integers(0, 1000))
def test_advantages_do_not_depend_on_the_order_of_samples(groups: list[list[float]], seed: int) -> None:
    rewards, ids = flat(groups)
    order = list(range(len(rewards)))
    random.Random(seed).shuffle(order)
    shuffled = advantages([rewards[i] for i in order], [ids[i] for i in order], std=True)
    torch.testing.assert_close(shuffled, advantages(rewards, ids, std=True)[order], rtol=1e-9, atol=1e-9)


@given(groups=st.lists(st.lists(st.integers(-50, 50), min_size=1, max_size=5), min_size=1), shift=st.integers(-50, 50))
def test_a_constant_added_to_a_group_changes_nothing(groups: list[list[int]], shift: int) -> None:
    rewards, ids = flat([[float(reward) for reward in group] for group in groups])
    shifted = [reward + shift if group == ids[0] else reward for reward, group in zip(rewards, ids, strict=True)]
    torch.testing.assert_close(advantages(shifted, ids, std=True), advantages(rewards, ids, std=True))


@given(value=st.floats(-1e6, 1e6, allow_nan=False, width=32), size=st.integers(1, 9), std=st.booleans())
def test_a_constant_group_gives_exactly_zero(value: float, size: int, std: bool) -> None:
    rewards = [value] * size + [0.0, 1.0]
    result = advantages(rewards, [3] * size + [5, 5], std=std, dtype=torch.float32)
    assert result[:size].tolist() == [0.0] * size


@pytest.mark.parametrize("value", [0.1, 0.3, 1e-8, 1 / 3])
def test_rounding_of_the_mean_does_not_leave_a_signal_in_a_constant_group(value: float) -> None:
    assert advantages([value] * 7, [0] * 7, std=True, dtype=torch.float32).tolist() == [0.0] * 7


def test_groups_of_one_three_and_five_are_normalised_apart() -> None:
    result = advantages([5, 0, 0, 3, 1, 1, 1, 1, 6], [9, 2, 2, 2, 4, 4, 4, 4, 4], std=False)
    assert result.tolist() == [0, -1, -1, 2, -1, -1, -1, -1, 4]


def test_no_samples_give_no_advantages() -> None:
    empty = grpo.advantages(torch.empty(0), torch.empty(0, dtype=torch.int64), std_normalize=True)
    assert empty.shape == (0,)
