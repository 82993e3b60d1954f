"""Where checkpoints lie and what they say of themselves; known without Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from slime.backends.shared.checkpoint import META, TRACKER, CheckpointError, iteration_folder

_COMPLETE = "metadata.json"  # of torch_dist, written last


class Meta(NamedTuple):
    """What slime says of a checkpoint of its own. num_steps: optimizer steps taken so far. schedule: `schedule_of`."""

    rollout_id: int
    num_steps: int
    schedule: dict[str, Any]
    role: str = "actor"


def find_checkpoint(root: str | None, step: int | None) -> Path | None:
    """The folder of step `step`, or the one that the tracker names; None where `root` holds no checkpoint.

    Raises CheckpointError where a step is asked for, or promised by the tracker, that is not there.
    """
    if root is None:
        return None
    tracker = Path(root) / TRACKER
    if step is None and not tracker.is_file():
        return None
    name = str(step) if step is not None else tracker.read_text().strip()
    if name != "release" and not name.isdigit():
        raise CheckpointError(f"{tracker} must hold a step number or release, got {name!r}")
    folder = Path(root) / name if name == "release" else iteration_folder(root, int(name))
    if not (is_torch_format(folder) or (folder / _COMPLETE).is_file()):
        there = sorted(path.name for path in Path(root).glob("iter_*"))
        raise CheckpointError(f"there is no complete checkpoint {folder}; present: {', '.join(there) or 'none'}")
    return folder


def is_torch_format(folder: Path) -> bool:
    """Whether a checkpoint, or the weights of one model, lies there in Megatron's older format: a file a rank."""
    return any(folder.glob("mp_rank_*/model_optim_rng.pt"))


def read_meta(folder: Path) -> Meta | None:
    """What slime says of the checkpoint; None of one that slime did not write."""
    path = folder / META
    return Meta(**json.loads(path.read_text())) if path.is_file() else None
