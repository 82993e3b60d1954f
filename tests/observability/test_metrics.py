import itertools
import math
import random
import time

import pytest

from slime.observability.metrics import eval_metrics, eval_names, has_repetition, pass_at_k, rollout_metrics
from slime.utils.types import PrefixCacheInfo, Sample, SampleStatus, SpecInfo


def make_sample(group: int, prompt_length: int, length: int, **fields: object) -> Sample:
    return Sample(
        group_index=group,
        tokens=[1] * (prompt_length + length),
        response_length=length,
        status=fields.pop("status", SampleStatus.COMPLETED),
        **fields,
    )


def random_samples(rng: random.Random, num_groups: int, group_size: int) -> tuple[list[Sample], list[float]]:
    samples, rewards = [], []
    for group in range(num_groups):
        for _ in range(group_size):
            length = rng.randint(1, 50)
            mask = [rng.randint(0, 1) for _ in range(length)] if rng.random() < 0.5 else None
            status = rng.choice(list(SampleStatus))
            samples.append(make_sample(group, rng.randint(1, 9), length, status=status, loss_mask=mask))
            rewards.append(float(rng.randint(0, 1)))
    return samples, rewards


def test_rollout_metrics_equal_a_plain_loop():
    samples, rewards = random_samples(random.Random(0), num_groups=12, group_size=3)
    metrics = rollout_metrics(samples, rewards, seconds=4.0, num_gpus=2)

    lengths = []
    truncated = failed = aborted = total = responses = 0
    for sample in samples:
        lengths.append(sum(sample.loss_mask) if sample.loss_mask is not None else sample.response_length)
        truncated += sample.status == SampleStatus.TRUNCATED
        failed += sample.status == SampleStatus.FAILED
        aborted += sample.status == SampleStatus.ABORTED
        total += len(sample.tokens)
        responses += sample.response_length
    ordered = sorted(lengths)
    count = len(samples)
    zeros = ones = 0
    for group in range(12):
        own = [r for s, r in zip(samples, rewards, strict=True) if s.group_index == group]
        zeros += all(r == 0 for r in own)
        ones += all(r == 1 for r in own)
    expected = {
        "rollout/raw_reward": sum(rewards) / count,
        "rollout/response_lengths": responses / count,
        "rollout/total_lengths": total / count,
        "rollout/truncated": truncated / count,
        "rollout/truncated_ratio": truncated / count,
        "rollout/failed": failed / count,
        "rollout/aborted": aborted / count,
        "rollout/repetition_frac": 0.0,
        "rollout/response_len/mean": sum(lengths) / count,
        "rollout/response_len/median": (ordered[count // 2 - 1] + ordered[count // 2]) / 2,
        "rollout/response_len/max": ordered[-1],
        "rollout/response_len/min": ordered[0],
        "rollout/zero_std/count_0": zeros,
        "rollout/zero_std/count_1": ones,
        "rollout/zero_std/ratio": (zeros + ones) / 12,
        "perf/rollout_time": 4.0,
        "perf/tokens_per_sec": sum(lengths) / 4.0,
        "perf/tokens_per_gpu_per_sec": sum(lengths) / 4.0 / 2,
        "perf/longest_sample_tokens_per_sec": ordered[-1] / 4.0,
    }
    assert zeros and ones
    assert metrics == pytest.approx(expected)


def test_a_sample_without_a_reward_counts_as_failed_but_not_in_means_or_groups():
    samples = [make_sample(0, 1, 4), make_sample(0, 1, 4), make_sample(0, 1, 4, status=SampleStatus.FAILED)]
    metrics = rollout_metrics(samples, [0.5, 0.5, math.nan], seconds=1.0, num_gpus=1)
    assert metrics["rollout/raw_reward"] == 0.5
    assert metrics["rollout/failed"] == pytest.approx(1 / 3)
    assert metrics["rollout/zero_std/count_0.5"] == 1


def test_groups_of_one_are_not_counted_as_constant():
    metrics = rollout_metrics([make_sample(0, 1, 4), make_sample(1, 1, 4)], [1.0, 1.0], seconds=1.0, num_gpus=1)
    assert not [key for key in metrics if "zero_std" in key]


def test_minus_zero_and_zero_are_one_reward():
    metrics = rollout_metrics([make_sample(0, 1, 4), make_sample(0, 1, 4)], [-0.0, 0.0], seconds=1.0, num_gpus=1)
    assert metrics["rollout/zero_std/count_0"] == 1


def test_engine_counters_are_pooled_over_tokens_not_averaged_over_samples():
    samples = [
        make_sample(0, 1, 4, prefix_cache_info=PrefixCacheInfo(cached_tokens=90, total_prompt_tokens=100)),
        make_sample(0, 1, 4, prefix_cache_info=PrefixCacheInfo(cached_tokens=0, total_prompt_tokens=20)),
    ]
    samples[0].spec_info = SpecInfo(
        spec_accept_token_num=6, spec_draft_token_num=12, spec_verify_ct=4, completion_token_num=10
    )
    metrics = rollout_metrics(samples, [0.0, 1.0], seconds=1.0, num_gpus=1)
    assert metrics["rollout/prefix_cache_hit_rate"] == 90 / 120
    assert metrics["rollout/spec_accept_rate"] == 0.5
    assert metrics["rollout/spec_accept_length"] == 2.5


def test_staleness_counts_versions_from_the_oldest_that_sampled_a_token():
    samples = [
        make_sample(0, 1, 4, weight_versions=["7"]),
        make_sample(0, 1, 4, weight_versions=["4", "7"]),
        make_sample(0, 1, 4, weight_versions=["default"]),
    ]
    metrics = rollout_metrics(samples, [0.0, 1.0, 1.0], seconds=1.0, num_gpus=1, weight_version=7)
    assert metrics["rollout/staleness/mean"] == 1.5
    assert metrics["rollout/staleness/max"] == 3
    assert metrics["rollout/staleness/mixed_ratio"] == 0.5
    counts = {key: value for key, value in metrics.items() if "staleness/count" in key}
    assert counts == {"rollout/staleness/count_0": 1, "rollout/staleness/count_3": 1}


@pytest.mark.parametrize("solved", range(9))
def test_pass_at_k_equals_the_average_over_all_subsets(solved: int):
    n = 8
    rewards = [1.0] * solved + [0.0] * (n - solved)
    rates = pass_at_k(rewards, n)
    assert list(rates) == [1, 2, 4, 8]
    for k, rate in rates.items():
        subsets = list(itertools.combinations(rewards, k))
        assert rate == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_pass_at_k_averages_over_prompts_and_stops_at_n():
    assert pass_at_k([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 3) == pytest.approx({1: 1 / 6, 2: 1 / 3})


def test_pass_at_k_does_not_count_partial_reward_or_nan_as_solved():
    assert pass_at_k([0.9, math.nan], 1) == {1: 0.0}


def test_eval_metrics_have_the_documented_keys():
    samples = [make_sample(0, 2, length) for length in (2, 4, 6, 8)]
    data = {"arith": {"rewards": [1.0, 0.0, 1.0, 1.0], "truncated": [False, True, False, False], "samples": samples}}
    metrics = eval_metrics(data, 2)
    assert metrics == {
        "eval/arith": 0.75,
        "eval/arith-truncated_ratio": 0.25,
        "eval/arith-pass@1": 0.75,
        "eval/arith-pass@2": 1.0,
        "eval/arith/response_len/mean": 5.0,
        "eval/arith/response_len/median": 5.0,
        "eval/arith/response_len/max": 8.0,
        "eval/arith/response_len/min": 2.0,
    }
    assert eval_names(metrics) == ["arith"]
    assert eval_metrics(data, {"arith": 4})["eval/arith-pass@4"] == 1.0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no samples"):
        rollout_metrics([], [], seconds=1.0, num_gpus=1)
    with pytest.raises(ValueError, match="1 samples but 2 rewards"):
        rollout_metrics([make_sample(0, 1, 1)], [1.0, 2.0], seconds=1.0, num_gpus=1)
    data = {"arith": {"rewards": [1.0] * 3, "truncated": [False] * 3, "samples": [make_sample(0, 1, 1)] * 3}}
    with pytest.raises(ValueError, match="'arith': 3 rewards are no multiple of 2"):
        eval_metrics(data, 2)


@pytest.mark.parametrize("period", [1, 3, 40, 400])
def test_a_response_that_ends_in_a_loop_is_a_repetition(period: int):
    rng = random.Random(period)
    unit = "".join(chr(rng.randint(97, 122)) for _ in range(period))
    assert has_repetition("Let me think. " + unit * (2048 // period + 1))


def test_prose_and_short_answers_are_no_repetition():
    rng = random.Random(0)
    words = ["".join(chr(rng.randint(97, 122)) for _ in range(rng.randint(2, 9))) for _ in range(200)]
    assert not has_repetition(" ".join(rng.choice(words) for _ in range(2000)))
    assert not has_repetition("1111111111")
    assert not has_repetition("")


def test_ten_thousand_samples_take_less_than_a_tenth_of_a_second():
    samples, rewards = random_samples(random.Random(1), num_groups=1250, group_size=8)
    for sample in samples:
        sample.response = "the answer is 12 " * 40
        sample.weight_versions = ["3"]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        rollout_metrics(samples, rewards, seconds=1.0, num_gpus=1, weight_version=3)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1
