"""Where checkpoints lie and what they say of themselves; known without Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

TRACKER = "latest_checkpointed_iteration.txt"
META = "meta.json"
_COMPLETE = "metadata.json"  # Megatron writes it last


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or not be read: absent, incomplete, or of another model."""


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
    if (folder / "mp_rank_00").is_dir() or (folder / "mp_rank_00_000").is_dir():
        raise CheckpointError(f"{folder} has the torch format: `slime convert` makes a Hugging Face directory of it")
    if not (folder / _COMPLETE).is_file():
        there = sorted(path.name for path in Path(root).glob("iter_*"))
        raise CheckpointError(f"there is no complete checkpoint {folder}; present: {', '.join(there) or 'none'}")
    return folder


def iteration_folder(root: str, rollout_id: int) -> Path:
    """The folder of the checkpoint written after `rollout_id`."""
    return Path(root) / f"iter_{rollout_id:07d}"


def read_meta(folder: Path) -> Meta | None:
    """What slime says of the checkpoint; None of one that slime did not write."""
    path = folder / META
    return Meta(**json.loads(path.read_text())) if path.is_file() else None
