"""What a checkpoint of the FSDP backend holds, read without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def saved_state(folder: Path) -> dict[str, Any]:
    """Every entry below `folder` (such as ckpt/iter_0000001) by name: tensors and plain values."""
    values: dict[str, Any] = {}
    for part in sorted(path.parent for path in folder.glob("*/.metadata")):
        state: dict[str, Any] = {}
        reader = FileSystemReader(part)
        _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        values |= _flat(state, part.name)
    return values


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, entry in value.items() for k, v in _flat(entry, f"{name}.{key}").items()}
    return {name: value}


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of the entries that are not the same bit for bit, or are on one side only."""
    return sorted(name for name in left.keys() | right.keys() if not _same(left.get(name), right.get(name)))


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right)
