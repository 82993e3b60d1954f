"""What a rank writes down of its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers.training import random_batch

from slime.config import AlgorithmConfig, OptimizerConfig
from slime.training.backend import ParallelLayout
from slime.training.dump import dump_train_data
from slime.training.estimators import mean_weights
from slime.training.plan import everything, plan_steps


def test_every_sequence_is_written_with_its_tokens_and_its_place(tmp_path: Path) -> None:
    batch, cfg = random_batch(group_sizes=(3, 1, 4)), AlgorithmConfig()
    steps = plan_steps(
        batch,
        ParallelLayout(0, 1, 0, 1),
        optimizer=OptimizerConfig(num_steps_per_rollout=2, micro_batch_size=3),
        weights=lambda mask, rollout: mean_weights(mask, rollout, cfg),
        per_token=False,
    )
    for part in everything(steps):
        part.advantages = part.loss_weights * 2
    data = np.load(dump_train_data(str(tmp_path / "in" / "{rollout_id}_{rank}.npz"), 3, 0, batch, steps))
    assert (tmp_path / "in" / "3_0.npz").is_file()
    rows = data["row"]
    assert sorted(rows) == list(range(8)) and set(data["step"]) == {0, 1}
    again = batch.select(rows)
    ends = np.cumsum(again.total_lengths)
    targets = [again.tokens[end - length : end] for end, length in zip(ends, again.response_lengths, strict=True)]
    np.testing.assert_array_equal(data["targets"], np.concatenate(targets))
    np.testing.assert_array_equal(data["loss_mask"], again.loss_mask)
    np.testing.assert_array_equal(data["rollout_log_probs"], again.rollout_log_probs)
    np.testing.assert_array_equal(data["advantages"], data["loss_weights"] * 2)
    assert "ref_log_probs" not in data  # nobody computed them
