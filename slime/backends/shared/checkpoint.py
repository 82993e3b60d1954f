"""Checkpoint folders that are complete or absent, whatever is written in them and by however many ranks.

SAVE/
|-- latest_checkpointed_iteration.txt     the last complete step, written last
|-- iter_0000010/
    |-- meta.json                         what slime says of it, and the backend's own files
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from slime.backends.shared.offload import alone
from slime.utils.files import fsync_tree, replace_directory, write_text_atomically

TRACKER = "latest_checkpointed_iteration.txt"
META = "meta.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or not be read: absent, incomplete, or of another model."""


def iteration_folder(root: str, rollout_id: int) -> Path:
    """The folder of the checkpoint written after `rollout_id`."""
    return Path(root) / f"iter_{rollout_id:07d}"


@contextmanager
def new_checkpoint(
    root: str, rollout_id: int, meta: dict[str, Any], *, group: dist.ProcessGroup | None = None
) -> Iterator[Path]:
    """A folder to write to, which becomes the checkpoint, and the tracker's, where that goes well on all ranks.

    A collective. meta: for META. group: of all ranks, where others may talk through the default one meanwhile.
    Raises CheckpointError on every rank where one fails: torch does not say that a disk is full, so it says what room
    there was.
    """
    final = iteration_folder(root, rollout_id)
    temporary = final.with_name(f".{final.name}.tmp")
    on_first = dist.get_rank() == 0
    try:
        with _whole_world(group):
            if on_first:
                _make_anew(temporary)
        with _whole_world(group):
            yield temporary
        with _whole_world(group):
            if on_first:
                (temporary / META).write_text(json.dumps(meta))
                fsync_tree(temporary)
                replace_directory(temporary, final)
                write_text_atomically(Path(root) / TRACKER, str(rollout_id))
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(final.parent if final.parent.is_dir() else ".").free
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{final} cannot be written; {free / 2**20:.1f} MiB were free there ({error})") from error


def _make_anew(temporary: Path) -> None:
    for left_over in temporary.parent.glob(".iter_*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)


@contextmanager
def _whole_world(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Where one rank fails, all do, so that none waits for it: an OSError that names the first that failed."""
    failure: BaseException | None = None
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        failure = error
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if failure is None else _with_rank(failure), group=group)
    for reason in filter(None, reasons):
        raise OSError(reason) from failure


def _with_rank(failure: BaseException) -> str:
    """Which rank failed, and why."""
    rank = next(iter(failure.failures)) if isinstance(failure, CheckpointException) else dist.get_rank()
    return f"rank {rank}: {reason_of(failure)}"


def save_durably(state: Any, path: Path) -> None:
    """Have torch write a file, forced to the disk, without what lies around its tensors in memory."""
    with path.open("wb") as file:
        torch.save(alone(state), file)
        file.flush()
        os.fsync(file.fileno())


def reason_of(error: BaseException) -> str:
    """One line; of what torch.distributed.checkpoint raises, an exception with a traceback of every rank, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".partition("\n")[0]
