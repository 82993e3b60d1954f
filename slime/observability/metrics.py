"""Metrics of a rollout and of an evaluation: pure functions from Samples to the documented keys.

Lengths are tokens, times are seconds, shares lie in [0, 1]. A NaN reward marks a sample that has none (it failed):
it counts in every share but is left out of reward means and of groups.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slime.utils.types import Sample, SampleStatus

_TAIL_CHARS = 32
_WINDOW_CHARS = 2048
_MIN_REPEATS = 5
STALENESS_COUNT = "rollout/staleness/count_"  # followed by an age in versions


def rollout_metrics(
    samples: Sequence[Sample],
    rewards: Sequence[float],
    *,
    seconds: float,
    num_gpus: int,
    weight_version: int | None = None,
) -> dict[str, float]:
    """The `rollout/*` and `perf/*` metrics of one rollout.

    rewards: one raw reward per sample. seconds: wall time of the whole rollout. num_gpus: devices that sampled.
    weight_version: the policy's version that trains on them; given, staleness is reported against it.

    `rollout/response_lengths` counts all response tokens, `rollout/response_len/*` and the throughputs only those
    that the policy sampled (the loss mask). Raises ValueError on no samples or on unequal lengths.
    """
    _check_lengths(len(samples), len(rewards))
    if seconds <= 0 or num_gpus <= 0:
        raise ValueError(f"seconds and num_gpus must be positive, got {seconds} and {num_gpus}")
    count = len(samples)
    statuses = Counter(sample.status for sample in samples)
    sampled_lengths = [sample.effective_response_length for sample in samples]
    truncated_share = statuses[SampleStatus.TRUNCATED] / count
    metrics = {
        "rollout/raw_reward": mean_reward(rewards),
        "rollout/response_lengths": sum(sample.response_length for sample in samples) / count,
        "rollout/total_lengths": sum(len(sample.tokens) for sample in samples) / count,
        "rollout/truncated": truncated_share,
        "rollout/truncated_ratio": truncated_share,
        "rollout/failed": statuses[SampleStatus.FAILED] / count,
        "rollout/aborted": statuses[SampleStatus.ABORTED] / count,
        "rollout/repetition_frac": sum(has_repetition(sample.response) for sample in samples) / count,
        "perf/rollout_time": seconds,
        "perf/tokens_per_sec": sum(sampled_lengths) / seconds,
        "perf/tokens_per_gpu_per_sec": sum(sampled_lengths) / seconds / num_gpus,
        "perf/longest_sample_tokens_per_sec": max(sampled_lengths) / seconds,
    }
    metrics |= length_statistics(sampled_lengths, "rollout/response_len")
    metrics |= _zero_std_counts(samples, rewards)
    metrics |= _engine_counters(samples)
    if weight_version is not None:
        metrics |= _staleness(samples, weight_version)
    return metrics


def eval_metrics(
    data: Mapping[str, Mapping[str, Any]],
    n_samples_per_prompt: int | Mapping[str, int],
    *,
    pass_reward: float = 1.0,
) -> dict[str, float]:
    """The `eval/*` metrics of one evaluation.

    data: `{name: {"rewards": [...], "truncated": [...], "samples": [...]}}`, the n samples of a prompt side by side.
    n_samples_per_prompt: n, one for all data sets or by name. pass_reward: the least reward that counts as solved.

    `eval/{name}` is the mean reward, `eval/{name}-pass@k` the unbiased estimate for each power of two k <= n.
    """
    metrics: dict[str, float] = {}
    for name, entry in data.items():
        rewards, samples = entry["rewards"], entry["samples"]
        try:
            _check_lengths(len(samples), len(rewards))
            n = n_samples_per_prompt if isinstance(n_samples_per_prompt, int) else n_samples_per_prompt[name]
            pass_rates = pass_at_k(rewards, n, pass_reward=pass_reward)
        except ValueError as error:
            raise ValueError(f"evaluation {name!r}: {error}") from error
        metrics[f"eval/{name}"] = mean_reward(rewards)
        metrics[f"eval/{name}-truncated_ratio"] = sum(map(bool, entry["truncated"])) / len(rewards)
        metrics |= {f"eval/{name}-pass@{k}": rate for k, rate in pass_rates.items()}
        lengths = [sample.effective_response_length for sample in samples]
        metrics |= length_statistics(lengths, f"eval/{name}/response_len")
    return metrics


def eval_names(keys: Iterable[str]) -> list[str]:
    """The names of the evaluation data sets whose metrics are among `keys`."""
    suffix = "-truncated_ratio"
    return [key[len("eval/") : -len(suffix)] for key in keys if key.startswith("eval/") and key.endswith(suffix)]


def pass_at_k(rewards: Sequence[float], n: int, *, pass_reward: float = 1.0) -> dict[int, float]:
    """Probability that one of k samples solves a prompt, averaged over prompts, for k = 1, 2, 4, ... <= n.

    rewards: prompt by prompt, n each. Per prompt with c solved of n: 1 - C(n-c, k) / C(n, k), the unbiased
    estimator of arXiv:2107.03374, section 2.1.
    """
    if n < 1 or len(rewards) % n:
        raise ValueError(f"{len(rewards)} rewards are no multiple of {n} samples per prompt")
    num_solved = Counter(num_solved_at(rewards[start : start + n], pass_reward) for start in range(0, len(rewards), n))
    num_prompts = len(rewards) // n
    powers = [1 << i for i in range(n.bit_length())]
    return {k: sum(prompts * pass_rate(n, c, k) for c, prompts in num_solved.items()) / num_prompts for k in powers}


def num_solved_at(rewards: Sequence[float], pass_reward: float) -> int:
    """How many rewards are that high."""
    return sum(reward >= pass_reward for reward in rewards)


def pass_rate(n: int, num_solved: int, k: int) -> float:
    """Probability that one of k samples, drawn from n of which `num_solved` are right, is right."""
    return 1 - math.comb(n - num_solved, k) / math.comb(n, k)


def mean_reward(rewards: Sequence[float]) -> float:
    """The mean of the rewards that are there; NaN where there is none."""
    present = [reward for reward in rewards if not math.isnan(reward)]
    return math.fsum(present) / len(present) if present else math.nan


def has_repetition(text: str) -> bool:
    """Whether a response ends in a loop: its last 32 characters stand 5 times or more in its last 2048."""
    return text[-_WINDOW_CHARS:].count(text[-_TAIL_CHARS:]) >= _MIN_REPEATS if len(text) > _TAIL_CHARS else False


def _check_lengths(num_samples: int, num_rewards: int) -> None:
    if num_samples == 0:
        raise ValueError("no samples to compute metrics of")
    if num_samples != num_rewards:
        raise ValueError(f"{num_samples} samples but {num_rewards} rewards")


def length_statistics(lengths: Sequence[int], prefix: str) -> dict[str, float]:
    """Mean, median, maximum and minimum."""
    return {
        f"{prefix}/mean": sum(lengths) / len(lengths),
        f"{prefix}/median": float(statistics.median(lengths)),
        f"{prefix}/max": float(max(lengths)),
        f"{prefix}/min": float(min(lengths)),
    }


def _zero_std_counts(samples: Sequence[Sample], rewards: Sequence[float]) -> dict[str, float]:
    """How many groups of two or more got one and the same reward, in all and by that reward rounded to 0.1.

    Such a group teaches nothing: its advantages are zero. Samples without a group index are no group.
    """
    groups: defaultdict[int, list[float]] = defaultdict(list)
    for sample, reward in zip(samples, rewards, strict=True):
        if sample.group_index is not None and not math.isnan(reward):
            groups[sample.group_index].append(reward)
    compared = [group for group in groups.values() if len(group) >= 2]
    if not compared:
        return {}
    constant = Counter(f"{round(group[0], 1) + 0.0:g}" for group in compared if min(group) == max(group))
    counts = {f"rollout/zero_std/count_{reward}": float(count) for reward, count in constant.items()}
    return counts | {"rollout/zero_std/ratio": constant.total() / len(compared)}


def _engine_counters(samples: Sequence[Sample]) -> dict[str, float]:
    """Prefix-cache and speculative-decoding rates, where the engine reported any."""
    metrics: dict[str, float] = {}
    prompt_tokens = sum(sample.prefix_cache_info.total_prompt_tokens for sample in samples)
    if prompt_tokens:
        cached_tokens = sum(sample.prefix_cache_info.cached_tokens for sample in samples)
        metrics["rollout/prefix_cache_hit_rate"] = cached_tokens / prompt_tokens
    verify_steps = sum(sample.spec_info.spec_verify_ct for sample in samples)
    draft_tokens = sum(sample.spec_info.spec_draft_token_num for sample in samples)
    if verify_steps and draft_tokens:
        accepted = sum(sample.spec_info.spec_accept_token_num for sample in samples)
        metrics["rollout/spec_accept_rate"] = accepted / draft_tokens
        metrics["rollout/spec_accept_length"] = (
            sum(sample.spec_info.completion_token_num for sample in samples) / verify_steps
        )
    return metrics


def _staleness(samples: Sequence[Sample], weight_version: int) -> dict[str, float]:
    """Versions between the policy that is trained and the oldest that sampled a token of the response, and how many
    samples there are of each age; samples without a numbered version (of an engine never updated) are left out."""
    known = [sample for sample in samples if sample.oldest_weight_version is not None]
    ages = [weight_version - (sample.oldest_weight_version or 0) for sample in known]
    if not ages:
        return {}
    counts = {f"{STALENESS_COUNT}{age}": float(count) for age, count in sorted(Counter(ages).items())}
    return counts | {
        "rollout/staleness/mean": sum(ages) / len(ages),
        "rollout/staleness/max": float(max(ages)),
        "rollout/staleness/mixed_ratio": sum(len(set(sample.weight_versions)) > 1 for sample in known) / len(ages),
    }
