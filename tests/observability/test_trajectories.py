import math
from pathlib import Path

import pytest

from slime.observability.trajectories import pick_samples, read_samples, write_samples
from slime.utils.types import Sample, SampleStatus


def token_texts(token_ids: list[int]) -> list[str]:
    return [f"<{token_id}>" for token_id in token_ids]


def make_sample(index: int, response_length: int = 4) -> Sample:
    return Sample(
        group_index=index // 4,
        index=index,
        tokens=[7, 8, *range(response_length)],
        response_length=response_length,
        rollout_log_probs=[-0.123456 * i for i in range(response_length)],
        label=str(index),
        status=SampleStatus.COMPLETED,
        weight_versions=["3", "3"],
    )


def test_a_record_holds_prompt_tokens_mask_log_probs_and_outcome(tmp_path: Path):
    sample = make_sample(0)
    sample.loss_mask = [1, 0, 0, 1]
    path = write_samples(tmp_path, 12, [sample], rewards=[1.0], token_texts=token_texts)
    assert path == tmp_path / "samples" / "rollout_000012.jsonl"
    assert read_samples(tmp_path) == {
        12: [
            {
                "rollout_id": 12,
                "index": 0,
                "group_index": 0,
                "pick": "best",
                "prompt": "<7><8>",
                "tokens": ["<0>", "<1>", "<2>", "<3>"],
                "loss_mask": [1, 0, 0, 1],
                "rollout_log_probs": [-0.0, -0.1235, -0.2469, -0.3704],
                "omitted": None,
                "reward": 1.0,
                "label": "0",
                "status": "completed",
                "failure": None,
                "weight_versions": ["3"],
            }
        ]
    }


@pytest.mark.parametrize("count", [1, 2, 4, 6, 7, 8, 30])
def test_the_choice_has_the_best_and_the_worst_and_no_sample_twice(count: int):
    samples = [make_sample(i) for i in range(count)]
    picks = pick_samples(samples, [float(i) for i in range(count)], seed=5)
    assert len(picks) == min(8, count)
    assert len({pick.sample.index for pick in picks}) == len(picks)
    assert [pick.reward for pick in picks if pick.kind == "best"] == [
        float(count - 1 - i) for i in range(min(3, count))
    ]
    num_worst = min(3, max(0, count - 3))
    assert [pick.reward for pick in picks if pick.kind == "worst"] == [float(i) for i in range(num_worst)]


def test_the_choice_is_the_same_for_the_same_seed_and_varies_with_it():
    samples = [make_sample(i) for i in range(100)]

    def chosen(seed: int) -> list[int | None]:
        return [pick.sample.index for pick in pick_samples(samples, [1.0] * 100, seed=seed)]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)


def test_a_failed_sample_counts_as_worst_and_keeps_its_reason(tmp_path: Path):
    samples = [make_sample(i) for i in range(8)]
    samples[2] = Sample(index=2, prompt="1+1=", status=SampleStatus.FAILED, metadata={"failure": "reward raised"})
    write_samples(tmp_path, 0, samples, rewards=[1.0, 1.0, math.nan, *[0.0] * 5], token_texts=token_texts)
    failed = next(record for record in read_samples(tmp_path)[0] if record["index"] == 2)
    assert (failed["pick"], failed["reward"], failed["failure"]) == ("worst", None, "reward raised")
    assert failed["prompt"] == "1+1="


def test_a_removed_sample_is_masked_throughout(tmp_path: Path):
    sample = make_sample(0)
    sample.remove_sample = True
    write_samples(tmp_path, 0, [sample], rewards=[1.0], token_texts=token_texts)
    assert read_samples(tmp_path)[0][0]["loss_mask"] == [0, 0, 0, 0]


def test_long_responses_keep_head_and_tail_in_step_with_mask_and_log_probs(tmp_path: Path):
    length = 5000
    write_samples(tmp_path, 3, [make_sample(9, length)], rewards=[1.0], token_texts=token_texts)
    (record,) = read_samples(tmp_path)[3]
    position, count = record["omitted"]
    kept = [*range(position), *range(position + count, length)]
    assert record["tokens"] == [f"<{i}>" for i in kept]
    assert record["rollout_log_probs"] == [round(-0.123456 * i, 4) for i in kept]
    assert len(record["loss_mask"]) == len(kept)
    assert (tmp_path / "samples" / "rollout_000003.jsonl").stat().st_size < 40_000


def test_no_partial_file_is_left(tmp_path: Path):
    write_samples(tmp_path, 0, [make_sample(0)], rewards=[0.0], token_texts=token_texts)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["rollout_000000.jsonl"]


def test_a_run_without_samples_reads_as_none(tmp_path: Path):
    assert read_samples(tmp_path) == {}
