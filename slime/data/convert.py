"""Training data that a plug-in returns as a dict, the one way in for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slime.data.batch import TrainBatch, batch_from_samples
from slime.utils.types import Sample

# Key of the dict -> field of the sample, one entry a sample.
_REQUIRED = {"tokens": "tokens", "response_lengths": "response_length"}
_OPTIONAL = {
    "loss_masks": "loss_mask",
    "rollout_log_probs": "rollout_log_probs",
    "teacher_log_probs": "teacher_log_probs",
    "sample_indices": "index",
    "rollout_ids": "rollout_id",
    "rollout_routed_experts": "rollout_routed_experts",
    "group_indices": "group_index",
}
# Written by such plug-ins for logs; training has no use for them.
_IGNORED = ("raw_reward", "truncated", "total_lengths", "metadata")


def batch_from_dict(data: Mapping[str, Any]) -> TrainBatch:
    """The batch that `--custom-convert-samples-to-train-data-path` describes; its rewards are taken as final.

    data: tokens (prompt + response), response_lengths and rewards, one entry a sample; optionally loss_masks,
    rollout_log_probs, teacher_log_probs (one value a response token), sample_indices, rollout_ids, group_indices,
    rollout_routed_experts (as of `Sample`).
    Raises ValueError, naming the key, where one is missing, unknown, or has another number of entries.
    """
    missing = [key for key in (*_REQUIRED, "rewards") if data.get(key) is None]
    if missing:
        raise ValueError(f"the training data has no {missing[0]!r}; it needs {', '.join((*_REQUIRED, 'rewards'))}")
    unknown = [key for key in data if key not in {*_REQUIRED, *_OPTIONAL, *_IGNORED, "rewards"}]
    if unknown:
        raise ValueError(f"the training data has an unknown key {unknown[0]!r}; known are {', '.join(_OPTIONAL)}")
    fields = {key: field for key, field in (_REQUIRED | _OPTIONAL).items() if data.get(key) is not None}
    num_samples = len(data["tokens"])
    for key in (*fields, "rewards"):
        if len(data[key]) != num_samples:
            raise ValueError(f"the training data has {num_samples} tokens entries but {len(data[key])} of {key!r}")
    samples = []
    for row in range(num_samples):
        values = {field: _plain(data[key][row], field) for key, field in fields.items()}
        samples.append(Sample(**{"group_index": row, "index": row} | values))
    return batch_from_samples(samples, [float(reward) for reward in data["rewards"]], rewards_are_final=True)


def _plain(value: Any, field: str) -> Any:
    """Tensors and arrays as lists, but for experts."""
    if field == "rollout_routed_experts":
        return np.asarray(value)
    if isinstance(value, Sequence):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value
