"""Metrics of a rollout that are logged on demand: pure functions from Samples, as in `metrics.py`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from slime.observability.metrics import length_statistics, num_solved_at, pass_rate
from slime.utils.types import Sample

PASS_REWARD = 1.0  # the least that counts as solved
_MAX_CATEGORIES = 50


def pass_rates(samples: Sequence[Sample], rewards: Sequence[float]) -> dict[str, float]:
    """`rollout/pass@k` for k = 1, 2, 4, ...: the mean over the groups of k samples or more.

    rewards: one raw reward per sample; NaN is not solved. Samples without a group index are no group.
    """
    groups: defaultdict[int, list[float]] = defaultdict(list)
    for sample, reward in zip(samples, rewards, strict=True):
        if sample.group_index is not None:
            groups[sample.group_index].append(reward)
    metrics = {}
    for power in range(max(map(len, groups.values()), default=0).bit_length()):
        k = 1 << power
        rates = [
            pass_rate(len(group), num_solved_at(group, PASS_REWARD), k) for group in groups.values() if len(group) >= k
        ]
        metrics[f"rollout/pass@{k}"] = math.fsum(rates) / len(rates)
    return metrics


def multi_turn(samples: Sequence[Sample]) -> dict[str, float]:
    """`rollout/multi_turn/*`: turns of the policy (stretches of its own tokens) and tokens put between them."""
    turns = [sum(own for own, _ in groupby(sample.loss_mask or [1] * sample.response_length)) for sample in samples]
    told = [sample.response_length - sample.effective_response_length for sample in samples]
    return length_statistics(turns, "rollout/multi_turn/turns") | length_statistics(
        told, "rollout/multi_turn/other_tokens"
    )


def correct_samples(samples: Sequence[Sample], rewards: Sequence[float]) -> dict[str, float]:
    """`rollout/correct/*` of the samples with reward 1 or more: their share, and the lengths of their responses."""
    correct = [sample for sample, reward in zip(samples, rewards, strict=True) if reward >= PASS_REWARD]
    share = {"rollout/correct/ratio": len(correct) / len(samples)}
    if not correct:
        return share
    return share | length_statistics(
        [sample.effective_response_length for sample in correct], "rollout/correct/response_len"
    )


def reward_categories(samples: Sequence[Sample], key: str) -> dict[str, float]:
    """`rollout/error_cat/VALUE`: the share of samples in whose reward dict `key` has that value.

    Samples without a reward (they failed) are in no category. Raises ValueError where a reward has no such entry, or
    there are too many values to be categories.
    """
    values: Counter[Any] = Counter()
    for sample in samples:
        if sample.reward is None:
            continue
        if not isinstance(sample.reward, dict) or key not in sample.reward:
            reward = f"the reward of sample {sample.index}"
            raise ValueError(f"--log-reward-category {key}: {reward} has no such entry: {sample.reward!r:.80}")
        values[str(sample.reward[key])] += 1
    if len(values) > _MAX_CATEGORIES:
        raise ValueError(f"--log-reward-category {key}: {len(values)} values in one rollout are no categories")
    return {f"rollout/error_cat/{value}": count / len(samples) for value, count in values.items()}
