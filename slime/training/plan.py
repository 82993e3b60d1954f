"""A rollout as this rank's micro-batches of every optimizer step. Shapes: T response tokens of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime.config import OptimizerConfig
from slime.data.batch import TrainBatch
from slime.data.packed import PackedBatch, pack_rows, response_values
from slime.data.schedule import PackingLimit, plan_step, split_steps
from slime.training.backend import ParallelLayout, TrainBackend

# (loss mask [T], rollout of each token [T]) -> [T], the share of each token in the step's loss.
TokenWeights = Callable[[Tensor, Tensor], Tensor]
Steps = list[list[PackedBatch]]


def plan_steps(
    batch: TrainBatch, layout: ParallelLayout, *, optimizer: OptimizerConfig, weights: TokenWeights, per_token: bool
) -> Steps:
    """This rank's micro-batches of every step; `rows` are those of `batch`.

    per_token: a mean is one over tokens, and not over rollouts: see `PackedBatch.step_total`.
    """
    limit = PackingLimit(optimizer.micro_batch_size)
    if optimizer.use_dynamic_batch_size:
        limit = PackingLimit(max_tokens=(optimizer.max_tokens_per_gpu or 0) * layout.context_size)
    steps = []
    for rows in split_steps(len(batch), optimizer.num_steps_per_rollout or 1):
        part = batch.select(rows)
        mask_T, rollout_T = torch.from_numpy(part.loss_mask), _rollout_of_tokens(part)
        weights_T = weights(mask_T, rollout_T)
        plan = plan_step(
            part.total_lengths,
            layout.data_rank,
            layout.data_size,
            limit=limit,
            balance=optimizer.balance_data,
            multiple_of=layout.micro_batches_multiple_of,
        )
        packed = [pack_rows(part, members, weights_T.numpy()) for members in plan]
        for micro_batch in packed:
            micro_batch.rows = [int(rows[row]) for row in micro_batch.rows]
            micro_batch.step_total = float(mask_T.sum() if per_token else rollout_T.max() + 1)
            micro_batch.weight_total = float(weights_T.sum()) or 1.0
        steps.append(packed)
    return steps


def everything(steps: Steps) -> list[PackedBatch]:
    """The micro-batches of all steps."""
    return [micro_batch for step in steps for micro_batch in step]


def whole_batch(
    backend: TrainBackend, batch: TrainBatch, parts: Sequence[tuple[PackedBatch, Tensor]]
) -> NDArray[np.float32]:
    """Per-token values of this rank's micro-batches and the other ranks', in the order of `batch`. Collective.

    parts: micro-batches of one whole plan with their values [T].
    """
    values: NDArray[np.float32] = np.zeros(int(batch.response_lengths.sum()), dtype=np.float32)
    places = np.arange(len(values))
    for micro_batch, part in parts:
        if micro_batch.rows:
            values[response_values(batch, micro_batch.rows, places)] = part.cpu().numpy()
    summed: NDArray[np.float32] = backend.sum_over_data_ranks(torch.from_numpy(values)).numpy()
    return summed


def _rollout_of_tokens(batch: TrainBatch) -> Tensor:
    """int64 [T] in [0, number of rollouts): siblings of a fan-out are one."""
    _, rollout_S = np.unique(batch.rollout_ids, return_inverse=True)
    repeated: Any = np.repeat(rollout_S, batch.response_lengths)
    return torch.from_numpy(repeated.astype(np.int64))
