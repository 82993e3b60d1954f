"""What plug-ins of the trainer see: plain dicts of one tensor a sample, and checks of what they return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slime.config import AlgorithmConfig
from slime.data.packed import PackedBatch
from slime.utils.misc import load_function

# Name in the plug-in's dict -> field of a PackedBatch.
_FIELDS = {
    "loss_masks": "loss_mask",
    "log_probs": "old_log_probs",
    "ref_log_probs": "ref_log_probs",
    "rollout_log_probs": "rollout_log_probs",
    "teacher_log_probs": "teacher_log_probs",
    "entropy": "entropy",
    "values": "values",
    "kl": "kl",
    "advantages": "advantages",
    "returns": "returns",
}


def sample_lists(batch: PackedBatch) -> dict[str, Any]:
    """`batch` as documented for plug-ins: lists with one entry a sample.

    tokens: int64, prompt and response. total_lengths, response_lengths: ints. The others: float32, one value a response
    token; only those that are there. log_probs are those of the old policy.
    """
    response_lengths = lengths_of(batch)
    lists: dict[str, Any] = {
        "tokens": list(torch.split(batch.input_ids, batch.sequence_lengths)),
        "total_lengths": list(batch.sequence_lengths),
        "response_lengths": response_lengths,
    }
    for name, field in _FIELDS.items():
        values: Tensor | None = getattr(batch, field)
        if values is not None:
            lists[name] = list(torch.split(values, response_lengths))
    return lists


def lengths_of(batch: PackedBatch) -> list[int]:
    """Response tokens of each sequence."""
    lengths: list[int] = torch.bincount(batch.sequence_ids, minlength=batch.num_sequences).tolist()
    return lengths


def joined(values: Sequence[Tensor], like: Tensor, *, what: str) -> Tensor:
    """One [T] from one tensor a sample. Raises ValueError, naming the plug-in, where the lengths do not add up."""
    flat = torch.cat([torch.as_tensor(entry, dtype=like.dtype, device=like.device).flatten() for entry in values])
    if flat.shape != like.shape:
        raise ValueError(f"{what} must have one value a response token, {len(like)} in all, got {len(flat)}")
    return flat


def postprocess(cfg: AlgorithmConfig, rollout_id: int, batches: Sequence[PackedBatch]) -> None:
    """--rollout-data-postprocess-path on this rank's share of a rollout, before its first optimizer step.

    It sees the dict of `sample_lists` over all micro-batches; what it makes of `advantages` and `returns` is trained
    on. Raises ValueError where these no longer have one value a response token.
    """
    path = cfg.rollout_data_postprocess_path
    own = [batch for batch in batches if batch.rows]
    if path is None or not own:
        return
    parts = [sample_lists(batch) for batch in own]
    data = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
    load_function(path)(cfg, rollout_id, data)
    start = 0
    for batch in own:
        stop = start + batch.num_sequences
        for name in {"advantages", "returns"} & data.keys():
            what = f"--rollout-data-postprocess-path {path}: rollout_data[{name!r}]"
            setattr(batch, name, joined(data[name][start:stop], batch.loss_mask, what=what))
        start = stop
