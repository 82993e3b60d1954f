from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import random_batch

from slime.config import AlgorithmConfig, OptimizerConfig
from slime.data.batch import TrainBatch
from slime.training.backend import ParallelLayout
from slime.training.estimators import mean_weights
from slime.training.plan import Steps, everything, plan_steps


def plans(batch: TrainBatch, *, num_ranks: int, num_steps: int, per_token: bool = False) -> list[Steps]:
    """The steps of every rank."""
    cfg = AlgorithmConfig(calculate_per_token_loss=per_token)
    optimizer = OptimizerConfig(num_steps_per_rollout=num_steps, use_dynamic_batch_size=True, max_tokens_per_gpu=40)
    return [
        plan_steps(
            batch,
            ParallelLayout(rank, num_ranks, rank, num_ranks),
            optimizer=optimizer,
            weights=lambda mask, rollout: mean_weights(mask, rollout, cfg),
            per_token=per_token,
        )
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_every_sample_is_trained_on_once_and_weights_add_up_to_one(num_ranks: int, num_steps: int) -> None:
    batch = random_batch(group_sizes=(3, 1, 4))
    ranks = plans(batch, num_ranks=num_ranks, num_steps=num_steps)
    rows = [row for steps in ranks for part in everything(steps) for row in part.rows]
    assert sorted(rows) == list(range(8))
    for step in range(num_steps):
        parts = [part for steps in ranks for part in steps[step]]
        total = sum(float(part.loss_weights.sum()) for part in parts)
        assert total == pytest.approx(parts[0].weight_total, rel=1e-5)
        assert {part.weight_total for part in parts} == {parts[0].weight_total}
        assert {part.step_total for part in parts} == {8 / num_steps}


def test_a_token_mean_divides_by_the_trained_tokens_of_the_step() -> None:
    batch = random_batch(group_sizes=(3, 1, 4))
    (steps,) = plans(batch, num_ranks=1, num_steps=1, per_token=True)
    assert {part.step_total for part in everything(steps)} == {float(batch.loss_mask.sum())}


def test_a_batch_masked_whole_has_no_weight_and_divides_by_no_zero() -> None:
    batch = random_batch()
    batch.loss_mask[:] = 0
    (steps,) = plans(batch, num_ranks=1, num_steps=1)
    assert all(part.weight_total == 1.0 and not part.loss_weights.any() for part in everything(steps))
    assert np.isfinite([float(torch.tensor(part.step_total)) for part in everything(steps)]).all()
