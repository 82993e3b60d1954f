"""One micro-batch: sequences laid end to end without padding, with the per-token inputs of the loss.

A worked example, two sequences with prompt p and response a, and prompt q and response b (N = 8, S = 2, T = 5):

    input_ids      = [p0 p1 a0 a1 a2 | q0 b0 b1]
    position_ids   = [ 0  1  2  3  4 |  0  1  2]
    target_index   = [       2  3  4 |     6  7]      places of the response tokens; the logits before predict them
    sequence_ids   = [       0  0  0 |     1  1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slime.data.batch import TrainBatch
from slime.utils.device import to_device

EXPERT_DTYPE = torch.int16
# A rank without samples still takes part in every collective: two tokens that weigh nothing.
_PLACEHOLDER_LENGTH = 2


@dataclass
class PackedBatch:
    """S sequences of N tokens in all, T of them response tokens. [T] fields follow the order of `target_index`."""

    input_ids: Tensor  # int64 [N]
    position_ids: Tensor  # int64 [N]
    sequence_lengths: list[int]  # S entries
    target_index: Tensor  # int64 [T]
    sequence_ids: Tensor  # int64 [T], in [0, S)
    loss_weights: Tensor  # float32 [T]: share of each token in the step's mean, 0 where masked
    loss_mask: Tensor  # float32 [T]
    rows: list[int]  # S rows of the TrainBatch; empty for a placeholder
    rollout_log_probs: Tensor | None = None  # float32 [T]
    old_log_probs: Tensor | None = None  # float32 [T]
    ref_log_probs: Tensor | None = None  # float32 [T]
    teacher_log_probs: Tensor | None = None  # float32 [T]
    entropy: Tensor | None = None  # float32 [T], the old policy's
    values: Tensor | None = None  # float32 [T], the critic's before the update
    advantages: Tensor | None = None  # float32 [T]
    returns: Tensor | None = None  # float32 [T], what the critic should have said
    kl: Tensor | None = None  # float32 [T], estimate of KL(policy || reference)
    routed_experts: Tensor | None = None  # int16 [N, layers, experts of a token] to be replayed; -1: not known, or here
    step_total: float = 1.0  # rollouts of the whole step (or tokens): what a sum over them is divided by for its mean
    weight_total: float = 1.0  # of `loss_weights` in the whole step
    on_host: PackedBatch | None = None  # what `to` moved: reading it waits for no GPU

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.sequence_lengths)

    @property
    def targets(self) -> Tensor:
        """[T] the response tokens themselves."""
        return self.input_ids[self.target_index]

    def to(self, device: torch.device) -> PackedBatch:
        """The same on `device`; itself where it is there already."""
        if self.input_ids.device == device:
            return self
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, on_host=self, **moved)


# Fields of a TrainBatch with one value a response token, under the same names here.
_RESPONSE_FIELDS = ("rollout_log_probs", "teacher_log_probs", "values", "kl")


def pack_rows(batch: TrainBatch, rows: Sequence[int], loss_weights: np.ndarray) -> PackedBatch:
    """The samples `rows` of `batch` as one micro-batch; no rows give a placeholder of no weight.

    loss_weights: float32, one value a response token of the whole `batch`, in its order.
    """
    given = [name for name in _RESPONSE_FIELDS if getattr(batch, name) is not None]
    given += ["routed_experts"] if batch.routed_experts is not None else []
    if not rows:
        return _placeholder(batch, given)
    rows = list(rows)
    part = batch.select(rows)
    lengths, response_lengths = part.total_lengths, part.response_lengths
    ends = np.cumsum(lengths, dtype=np.int64)
    sequence_of_token = np.repeat(np.arange(len(rows)), lengths)
    is_response = (ends[sequence_of_token] - np.arange(ends[-1])) <= response_lengths[sequence_of_token]
    target_index = np.flatnonzero(is_response)
    return PackedBatch(
        input_ids=torch.from_numpy(part.tokens.astype(np.int64)),
        position_ids=torch.from_numpy(np.arange(ends[-1]) - (ends - lengths)[sequence_of_token]),
        sequence_lengths=lengths.tolist(),
        target_index=torch.from_numpy(target_index),
        sequence_ids=torch.from_numpy(sequence_of_token[target_index]),
        loss_weights=torch.from_numpy(response_values(batch, rows, loss_weights)),
        loss_mask=torch.from_numpy(part.loss_mask.copy()),
        rows=rows,
        **_tensors(part, given),
    )


def _tensors(batch: TrainBatch, fields: list[str]) -> dict[str, Any]:
    return {name: torch.from_numpy(getattr(batch, name).copy()) for name in fields}


def response_values(batch: TrainBatch, rows: Sequence[int], values: np.ndarray) -> np.ndarray:
    """The entries of `values` (one a response token of `batch`) that belong to `rows`, in their order. Returns [T]."""
    ends = np.cumsum(batch.response_lengths, dtype=np.int64)
    return np.concatenate([values[ends[row] - batch.response_lengths[row] : ends[row]] for row in rows])


def _placeholder(batch: TrainBatch, fields: list[str]) -> PackedBatch:
    nothing: dict[str, Any] = {name: torch.zeros(1) for name in fields}
    if batch.routed_experts is not None:
        nothing["routed_experts"] = torch.full(
            (_PLACEHOLDER_LENGTH, *batch.routed_experts.shape[1:]), -1, dtype=EXPERT_DTYPE
        )
    return PackedBatch(
        input_ids=torch.zeros(_PLACEHOLDER_LENGTH, dtype=torch.int64),
        position_ids=torch.arange(_PLACEHOLDER_LENGTH),
        sequence_lengths=[_PLACEHOLDER_LENGTH],
        target_index=torch.tensor([1]),
        sequence_ids=torch.tensor([0]),
        loss_weights=torch.zeros(1),
        loss_mask=torch.zeros(1),
        rows=[],
        **nothing,
    )
