from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from helpers.training import random_batch, random_samples
from hypothesis import given
from hypothesis import strategies as st

from slime.data.batch import TrainBatch, batch_from_samples
from slime.utils.types import Sample

ROWS = st.lists(st.integers(0, 7), max_size=10)


def two() -> list[Sample]:
    """The example of the module's docstring."""
    return [
        Sample(group_index=4, index=8, tokens=[1, 2, 3, 4, 5], response_length=3, rollout_log_probs=[-0.1, -0.2, -0.3]),
        Sample(
            group_index=4, index=9, tokens=[6, 7, 8], response_length=2, loss_mask=[0, 1], rollout_log_probs=[-1, -2.0]
        ),
    ]


def test_samples_are_laid_end_to_end() -> None:
    batch = batch_from_samples(two(), [1.0, 0.5])
    assert len(batch) == 2
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.total_lengths.tolist() == [5, 3]
    assert batch.response_lengths.tolist() == [3, 2]
    assert batch.loss_mask.tolist() == [1, 1, 1, 0, 1]
    assert batch.rollout_log_probs is not None
    assert batch.rollout_log_probs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -1, -2])
    assert batch.rewards.tolist() == [1.0, 0.5]
    assert batch.group_ids.tolist() == [4, 4]
    assert batch.sample_indices.tolist() == [8, 9]


def test_a_removed_sample_is_masked_whole() -> None:
    samples = two()
    samples[1].remove_sample = True
    assert batch_from_samples(samples, [0, 0]).loss_mask.tolist() == [1, 1, 1, 0, 0]


def test_engine_log_probs_are_kept_only_where_every_sample_has_them() -> None:
    samples = two()
    samples[0].rollout_log_probs = None
    assert batch_from_samples(samples, [0, 0]).rollout_log_probs is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": [1]}, "sample 9: loss_mask has 1 entries, the response has 2 tokens"),
        ({"rollout_log_probs": [0.0]}, "sample 9: rollout_log_probs has 1 entries, the response has 2 tokens"),
        ({"response_length": 4, "loss_mask": None}, "sample 9: response_length 4 exceeds its 3 tokens"),
        ({"response_length": 0, "loss_mask": [], "rollout_log_probs": []}, "sample 9 .* 3 tokens, of which 0 response"),
        (
            {"response_length": 3, "loss_mask": None, "rollout_log_probs": None},
            "sample 9 .* 3 tokens, of which 3 response; training needs at least one of prompt",
        ),
        ({"group_index": None}, "sample 9 has no group_index"),
    ],
)
def test_a_sample_that_contradicts_itself_is_named(change: dict[str, object], message: str) -> None:
    samples = two()
    samples[1] = dataclasses.replace(samples[1], **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        batch_from_samples(samples, [0, 0])


def test_no_samples_and_too_few_rewards_are_errors() -> None:
    with pytest.raises(ValueError, match="returned no samples"):
        batch_from_samples([], [])
    with pytest.raises(ValueError, match="2 samples but 1 rewards"):
        batch_from_samples(two(), [1.0])


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_reward_that_is_not_finite_is_named(reward: float) -> None:
    with pytest.raises(ValueError, match=r"sample 9: the reward that its reward function or generation set is "):
        batch_from_samples(two(), [0.0, reward])
    with pytest.raises(ValueError, match="sample 8: the reward that --custom-reward-post-process-path returned is "):
        batch_from_samples(two(), [reward, 0.0], rewards_are_final=True)


@given(rows=ROWS)
def test_selecting_rows_is_the_same_as_laying_out_those_samples(rows: list[int]) -> None:
    samples = random_samples()
    batch = batch_from_samples(samples, list(range(8)))
    part = batch.select(rows)
    assert len(part) == len(rows)
    if not rows:
        assert part.tokens.size == part.loss_mask.size == 0
        return
    expected = batch_from_samples([samples[row] for row in rows], [float(row) for row in rows])
    for field in dataclasses.fields(TrainBatch):
        np.testing.assert_array_equal(getattr(part, field.name), getattr(expected, field.name), err_msg=field.name)


def test_every_array_declares_its_axis_and_keeps_its_type() -> None:
    batch = random_batch()
    part = batch.select([3, 1])
    for field in dataclasses.fields(TrainBatch):
        value = getattr(batch, field.name)
        assert ("axis" in field.metadata) == (isinstance(value, np.ndarray) or value is None)
        if isinstance(value, np.ndarray):
            assert getattr(part, field.name).dtype == value.dtype


def test_selecting_keeps_whether_rewards_are_final() -> None:
    assert batch_from_samples(two(), [0, 0], rewards_are_final=True).select([0]).rewards_are_final


def test_a_batch_that_may_not_be_written_to_can_be_selected_from() -> None:
    batch = pickle.loads(pickle.dumps(random_batch()))
    for field in dataclasses.fields(TrainBatch):
        if isinstance(getattr(batch, field.name), np.ndarray):
            getattr(batch, field.name).flags.writeable = False  # as shared memory is
    assert batch.select([1, 0]).tokens.flags.writeable
