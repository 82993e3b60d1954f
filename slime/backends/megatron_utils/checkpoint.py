"""Checkpoints in Megatron's torch_dist format, complete or absent, readable at any parallelism.

SAVE/
|-- latest_checkpointed_iteration.txt     the last complete step, written last; "release": weights alone
|-- iter_0000010/                         Megatron's files: weights, and the optimizer's state
    |-- ref/ old_actor/                   weights that the run moved: `copy_weights`
    |-- rng/ meta.json                    random numbers of each rank; rollout and steps
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from slime.backends.megatron_utils import optimizer_state
from slime.backends.megatron_utils.folders import META, TRACKER, CheckpointError, Meta, iteration_folder
from slime.utils.files import fsync_tree, replace_directory, write_text_atomically

logger = logging.getLogger(__name__)


@contextmanager
def new_checkpoint(root: str, meta: Meta) -> Iterator[Path]:
    """A folder to write to that becomes the checkpoint, and the tracker's, where all goes well. A collective."""
    final = iteration_folder(root, meta.rollout_id)
    temporary = final.with_name(f".{final.name}.tmp")
    on_first = dist.get_rank() == 0
    if on_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        yield temporary
        dist.barrier()
        if on_first:
            (temporary / META).write_text(json.dumps(meta._asdict()))
            fsync_tree(temporary)
            replace_directory(temporary, final)
            write_text_atomically(Path(root) / TRACKER, str(meta.rollout_id))
    except (OSError, RuntimeError, CheckpointException, CheckpointingException) as error:
        free = shutil.disk_usage(root).free
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{final} cannot be written; {free / 2**20:.1f} MiB were free there ({error})") from error
    dist.barrier()


def write(folder: Path, lms: list[nn.Module], optimizer: Any | None = None) -> None:
    """Write weights, and an optimizer's state with them, to an empty folder or a new one in it. A collective."""
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
    dist.barrier()
    weights = _sharded(lms)
    state = {"checkpoint_version": 3.0, **weights}
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded(optimizer, _sharded(lms, by_layer=True))
    dist_checkpointing.save(state, str(folder))


def _sharded(lms: list[nn.Module], *, by_layer: bool = False) -> dict[str, Any]:
    """The weights of each stage under Megatron's names for them; in a file their layers are counted over all.

    by_layer: each layer has tensors of its own, else those of all layers are one: only some may have optimizer state.
    """
    names = ["model"] if len(lms) == 1 else [f"model{number}" for number in range(len(lms))]
    metadata = {"non_homogeneous_layers": True} if by_layer else None
    return {name: lm.sharded_state_dict(metadata=metadata) for name, lm in zip(names, lms, strict=True)}  # type: ignore[operator]


def read_weights(folder: Path, lms: list[nn.Module]) -> None:
    """Read weights into `lms`, whatever the ranks they were saved from. Raises CheckpointError where they don't fit."""
    weights = _sharded(lms)
    state = _load(folder, weights)
    for lm, name in zip(lms, weights, strict=True):
        lm.load_state_dict(state[name])


def read_optimizer(folder: Path, lms: list[nn.Module], optimizer: Any) -> None:
    """Read moments and step counts; learning rate, decay and betas stay as the settings say."""
    kept = ("lr", "weight_decay", "betas", "eps", "momentum")
    settings = [{name: group[name] for name in kept if name in group} for group in optimizer.param_groups]
    wanted = optimizer_state.sharded(optimizer, _sharded(lms, by_layer=True), is_loading=True)
    empty = optimizer_state.empty_parts(wanted)
    loaded = _load(folder, {"optimizer": wanted})["optimizer"]
    optimizer.load_state_dict(optimizer_state.complete(loaded, empty))
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def _load(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointException, CheckpointingException, KeyError, ValueError) as error:
        if "optimizer" in wanted:
            what = "holds no optimizer such as this run's: pass --no-load-optim to start with a new one"
        else:
            what = "is a checkpoint of another model"
        raise CheckpointError(f"{folder} {what} ({_first_line(error)})") from error
    return state


def _first_line(error: BaseException) -> str:
    """What is wrong, without the ranks' tracebacks and the names of all tensors."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).partition("\n")[0].partition(" not in state dict")[0]


def write_rng(folder: Path) -> None:
    """The state of this rank's random numbers."""
    states = {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    (folder / "rng").mkdir(exist_ok=True)
    torch.save(states, folder / "rng" / f"{dist.get_rank()}.pt")


def read_rng(folder: Path) -> None:
    """Restore it; another number of ranks keeps its own."""
    if len(list((folder / "rng").glob("*.pt"))) != dist.get_world_size():
        logger.warning("%s was written by another number of ranks: random numbers start anew", folder)
        return
    states = torch.load(folder / "rng" / f"{dist.get_rank()}.pt", weights_only=False)
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
