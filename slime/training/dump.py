"""What one rank trained on, written for debugging: `--save-debug-train-data`.

One .npz file a rollout and rank. [S] arrays have an entry a sequence, [T] arrays one a response token, in the order in
which they were trained on; `step` and `micro_batch` [S] say when, `row` [S] is the place in the rollout's batch.
Ranks that share the tokens of samples write the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from slime.data.batch import TrainBatch
from slime.training.plan import Steps

_PER_TOKEN = (
    "targets",
    "loss_mask",
    "loss_weights",
    "rollout_log_probs",
    "old_log_probs",
    "ref_log_probs",
    "teacher_log_probs",
    "values",
    "advantages",
    "returns",
    "kl",
)


def dump_train_data(template: str, rollout_id: int, rank: int, batch: TrainBatch, steps: Steps) -> Path:
    """Write this rank's share of a rollout as its losses saw it; returns the file. The folder is made."""
    path = Path(template.format(rollout_id=rollout_id, rank=rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [(step, place, part) for step, parts in enumerate(steps) for place, part in enumerate(parts) if part.rows]
    rows = [row for _, _, part in parts for row in part.rows]
    arrays: dict[str, Any] = {
        "row": rows,
        "step": [step for step, _, part in parts for _ in part.rows],
        "micro_batch": [place for _, place, part in parts for _ in part.rows],
        "sample_index": batch.sample_indices[rows],
        "group_id": batch.group_ids[rows],
        "reward": batch.rewards[rows],
        "total_length": batch.total_lengths[rows],
        "response_length": batch.response_lengths[rows],
    }
    for name in _PER_TOKEN:
        values = [getattr(part, name) for _, _, part in parts]
        if values and all(value is not None for value in values):
            arrays[name] = torch.cat([value.detach().cpu() for value in values]).numpy()
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path
