"""Metrics that are logged on demand."""

from __future__ import annotations

import math
from itertools import chain, combinations

import pytest

from slime.observability.details import correct_samples, multi_turn, pass_rates, reward_categories
from slime.utils.types import Sample


def sample(group: int | None = 0, mask: tuple[int, ...] = (1,), reward: object = None) -> Sample:
    return Sample(group_index=group, response_length=len(mask), loss_mask=list(mask), reward=reward)  # type: ignore[arg-type]


def test_pass_rates_are_means_over_the_groups_that_are_large_enough() -> None:
    rewards = {0: [1.0, 0.0, 0.0, math.nan], 1: [1.0, 2.0], 2: [0.5]}
    samples = [sample(group) for group, values in rewards.items() for _ in values]
    rates = pass_rates([*samples, sample(None)], [*chain(*rewards.values()), 1.0])

    def rate(values: list[float], k: int) -> float:
        draws = list(combinations(values, k))
        return sum(any(value >= 1 for value in draw) for draw in draws) / len(draws)

    expected = {k: [rate(values, k) for values in rewards.values() if len(values) >= k] for k in (1, 2, 4)}
    assert rates == pytest.approx({f"rollout/pass@{k}": sum(v) / len(v) for k, v in expected.items()})
    assert pass_rates([sample(None)], [1.0]) == {}


def test_turns_are_stretches_of_the_policys_own_tokens() -> None:
    metrics = multi_turn([sample(mask=(1, 1, 0, 0, 0, 1, 0)), sample(mask=(1, 1))])
    assert metrics["rollout/multi_turn/turns/mean"] == 1.5 and metrics["rollout/multi_turn/turns/max"] == 2
    assert metrics["rollout/multi_turn/other_tokens/max"] == 4 and metrics["rollout/multi_turn/other_tokens/min"] == 0
    whole = Sample(response_length=3)
    assert multi_turn([whole])["rollout/multi_turn/turns/mean"] == 1


def test_lengths_of_correct_samples_are_their_own() -> None:
    samples = [sample(mask=(1, 1, 1)), sample(), sample(mask=(1, 0))]
    metrics = correct_samples(samples, [1.0, 0.9, math.nan])
    assert metrics["rollout/correct/ratio"] == pytest.approx(1 / 3)
    assert metrics["rollout/correct/response_len/mean"] == 3
    assert correct_samples(samples, [0.0, 0.0, 0.0]) == {"rollout/correct/ratio": 0.0}


def test_shares_of_reward_categories_leave_out_failed_samples() -> None:
    samples = [
        sample(reward={"why": "format"}),
        sample(reward={"why": "format"}),
        sample(reward={"why": True}),
        sample(),
    ]
    assert reward_categories(samples, "why") == {"rollout/error_cat/format": 0.5, "rollout/error_cat/True": 0.25}
    with pytest.raises(ValueError, match="--log-reward-category who: the reward of sample None has no such entry"):
        reward_categories(samples, "who")
    with pytest.raises(ValueError, match="no such entry: 1.0"):
        reward_categories([sample(reward=1.0)], "why")
    with pytest.raises(ValueError, match="60 values in one rollout are no categories"):
        reward_categories([sample(reward={"why": number}) for number in range(60)], "why")
