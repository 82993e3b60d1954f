from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.data.schedule import (
    PackingLimit,
    pack,
    plan_step,
    sequence_costs,
    share_among_ranks,
    split_into,
    split_steps,
)

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=24)
LIMITS = st.one_of(
    st.builds(PackingLimit, max_tokens=st.integers(1, 400)),
    st.builds(PackingLimit, max_samples=st.integers(1, 5)),
)


@given(lengths=LENGTHS, num_ranks=st.integers(1, 6), limit=LIMITS, balance=st.booleans())
def test_a_plan_uses_every_sample_once_within_the_limit_and_gives_all_ranks_as_many_micro_batches(
    lengths: list[int], num_ranks: int, limit: PackingLimit, balance: bool
) -> None:
    sizes = np.array(lengths, dtype=np.int32)
    plans = [plan_step(sizes, rank, num_ranks, limit=limit, balance=balance) for rank in range(num_ranks)]
    rows = [row for plan in plans for micro_batch in plan for row in micro_batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert len({len(plan) for plan in plans}) == 1
    for plan in plans:
        for micro_batch in plan:
            if len(micro_batch) > 1:
                assert limit.admits(len(micro_batch), sum(lengths[row] for row in micro_batch))


@given(lengths=LENGTHS, limit=LIMITS)
def test_first_fit_needs_at_most_twice_the_fewest_micro_batches(lengths: list[int], limit: PackingLimit) -> None:
    bins = pack(lengths, limit)
    if limit.max_tokens is None:
        assert len(bins) == -(-len(lengths) // limit.max_samples)
    else:
        fewest = sum(min(length, limit.max_tokens) for length in lengths) / limit.max_tokens
        assert len(bins) <= 2 * fewest + 1


def test_a_sample_longer_than_the_limit_stands_alone() -> None:
    assert sorted(map(sorted, pack([50, 10, 10], PackingLimit(max_tokens=25)))) == [[0], [1, 2]]


@given(costs=st.lists(st.floats(1, 100), min_size=1, max_size=24), num_ranks=st.integers(1, 6), balance=st.booleans())
def test_no_rank_stays_empty_while_there_is_a_sample_for_each(
    costs: list[float], num_ranks: int, balance: bool
) -> None:
    shares = share_among_ranks(costs, num_ranks, balance=balance)
    assert sorted(row for share in shares for row in share) == list(range(len(costs)))
    assert sum(not share for share in shares) == max(0, num_ranks - len(costs))


@given(costs=st.lists(st.floats(1, 100), min_size=1, max_size=24), num_ranks=st.integers(2, 6))
def test_balanced_loads_differ_by_at_most_the_heaviest_sample(costs: list[float], num_ranks: int) -> None:
    loads = [sum(costs[row] for row in share) for share in share_among_ranks(costs, num_ranks, balance=True)]
    assert max(loads) - min(loads) <= max(costs) + 1e-9


@given(seed=st.integers(0, 99), num_ranks=st.sampled_from([2, 4, 8]))
def test_balanced_ranks_get_near_equal_tokens_of_uneven_responses(seed: int, num_ranks: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(6.5, 0.9, 256).clip(1, 8192).astype(np.int32)
    costs = sequence_costs(lengths).tolist()
    worst = []
    for balance in (True, False):
        shares = share_among_ranks(costs, num_ranks, balance=balance)
        tokens = [int(lengths[share].sum()) for share in shares]
        worst.append(max(tokens) / (sum(tokens) / num_ranks))
    assert worst[0] < 1.03
    assert worst[0] <= worst[1]


def test_unbalanced_samples_are_dealt_in_turn() -> None:
    assert share_among_ranks([9, 1, 1, 1, 1], 2, balance=False) == [[0, 2, 4], [1, 3]]


def test_the_cost_of_attention_grows_with_the_square() -> None:
    short, long = sequence_costs(np.array([10, 24_576], dtype=np.int32))
    assert short == pytest.approx(10, rel=1e-3)
    assert long == pytest.approx(2 * 24_576)


@given(num_samples=st.integers(1, 60), num_steps=st.integers(1, 12))
def test_steps_are_consecutive_use_every_sample_and_are_never_empty(num_samples: int, num_steps: int) -> None:
    steps = split_steps(num_samples, num_steps)
    assert np.concatenate(steps).tolist() == list(range(num_samples))
    sizes = [len(step) for step in steps]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert len(steps) == min(num_steps, num_samples)


def test_splitting_further_halves_the_heaviest_and_then_adds_empty_ones() -> None:
    lengths = [5, 5, 1, 1]
    assert split_into([[0, 1], [2, 3]], 3, lengths) == [[0], [2, 3], [1]]
    assert split_into([[0], [1]], 4, lengths) == [[0], [1], [], []]
