from __future__ import annotations

import numpy as np
import torch
from helpers.training import random_samples
from hypothesis import given
from hypothesis import strategies as st

from slime.data.batch import batch_from_samples
from slime.data.packed import pack_rows, response_values
from slime.utils.types import Sample

ROWS = st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True)


def test_the_example_of_the_docstring() -> None:
    samples = [
        Sample(group_index=0, tokens=[10, 11, 20, 21, 22], response_length=3),
        Sample(group_index=0, tokens=[12, 30, 31], response_length=2),
    ]
    packed = pack_rows(batch_from_samples(samples, [0, 0]), [0, 1], np.arange(5, dtype=np.float32))
    assert packed.input_ids.tolist() == [10, 11, 20, 21, 22, 12, 30, 31]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert packed.target_index.tolist() == [2, 3, 4, 6, 7]
    assert packed.targets.tolist() == [20, 21, 22, 30, 31]
    assert packed.sequence_ids.tolist() == [0, 0, 0, 1, 1]
    assert packed.loss_weights.tolist() == [0, 1, 2, 3, 4]
    assert packed.sequence_lengths == [5, 3]
    assert packed.num_sequences == 2


@given(rows=ROWS)
def test_each_sequence_keeps_its_own_values_in_any_order(rows: list[int]) -> None:
    samples = random_samples()
    batch = batch_from_samples(samples, [0.0] * 8)
    weights = np.arange(len(batch.loss_mask), dtype=np.float32)
    starts = np.cumsum(batch.response_lengths) - batch.response_lengths
    packed = pack_rows(batch, rows, weights)
    assert packed.rollout_log_probs is not None
    for place, row in enumerate(rows):
        mine = packed.sequence_ids == place
        sample = samples[row]
        assert packed.targets[mine].tolist() == sample.tokens[-sample.response_length :]
        assert packed.loss_mask[mine].tolist() == sample.loss_mask
        torch.testing.assert_close(packed.rollout_log_probs[mine], torch.tensor(sample.rollout_log_probs))
        assert packed.loss_weights[mine].tolist() == [starts[row] + i for i in range(sample.response_length)]
    assert len(packed.input_ids) == sum(packed.sequence_lengths) == sum(len(samples[row].tokens) for row in rows)
    assert (packed.position_ids == 0).sum() == len(rows)
    np.testing.assert_array_equal(response_values(batch, rows, weights), packed.loss_weights.numpy())


def test_no_rows_give_a_placeholder_that_weighs_nothing() -> None:
    samples = random_samples()
    placeholder = pack_rows(batch_from_samples(samples, [0.0] * 8), [], np.zeros(0, dtype=np.float32))
    assert placeholder.rows == []
    assert placeholder.loss_weights.tolist() == [0.0]
    assert placeholder.rollout_log_probs is not None
    assert len(placeholder.targets) == 1
    for sample in samples:
        sample.rollout_log_probs = None
    bare = pack_rows(batch_from_samples(samples, [0.0] * 8), [], np.zeros(0, dtype=np.float32))
    assert bare.rollout_log_probs is None


def test_packing_copies_so_that_the_batch_stays_as_it_was() -> None:
    batch = batch_from_samples(random_samples(), [0.0] * 8)
    before = batch.tokens.copy(), batch.loss_mask.copy()
    packed = pack_rows(batch, [0, 1], batch.loss_mask)
    packed.input_ids += 1
    packed.loss_mask += 1
    packed.loss_weights += 1
    np.testing.assert_array_equal(batch.tokens, before[0])
    np.testing.assert_array_equal(batch.loss_mask, before[1])


def test_moving_to_where_it_is_already_is_the_batch_itself() -> None:
    packed = pack_rows(batch_from_samples(random_samples(), [0.0] * 8), [0], np.ones(100, dtype=np.float32))
    assert packed.to(torch.device("cpu")) is packed
    moved = packed.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.loss_weights.device.type == "meta"
    assert moved.rows == packed.rows
