"""Checkpoints of Megatron's two formats, complete or absent.

SAVE/
|-- latest_checkpointed_iteration.txt     the last complete step, written last; "release": weights alone
|-- iter_0000010/                         Megatron's files: weights, and the optimizer's state
    |-- ref/ old_actor/                   weights that the run moved: `copy_weights`
    |-- rng/ meta.json                    random numbers of each rank; rollout and steps
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from slime.backends.megatron_utils import torch_dist, torch_files
from slime.backends.megatron_utils.folders import Meta, is_torch_format
from slime.backends.megatron_utils.model import Chunk
from slime.backends.megatron_utils.names import ModelShape
from slime.backends.megatron_utils.optimizer import make_moments
from slime.backends.shared.checkpoint import new_checkpoint, save_durably

logger = logging.getLogger(__name__)

Format = Literal["torch_dist", "torch"]
Part = torch_dist.Part | torch_files.Part


class Content(NamedTuple):
    """What this rank writes of a run. parts: by folder, "" being the checkpoint's. rng: `random_numbers`."""

    meta: Meta
    parts: dict[str, Part]
    rng: dict[str, Any]


def part_of(chunk: Chunk, optimizer: Any | None = None, *, kind: Format, iteration: int) -> Part:
    """Weights, and an optimizer's state with them, as they are now, not copied. A collective."""
    if optimizer is not None:
        make_moments(optimizer)
    if kind == "torch":
        return torch_files.part_of(chunk.lms, optimizer, iteration=iteration)
    return torch_dist.part_of(chunk.lms, optimizer)


def save(root: str, content: Content, group: dist.ProcessGroup | None = None) -> None:
    """Write a checkpoint. A collective of `group`, which has all ranks; None: the default one."""
    with new_checkpoint(root, content.meta.rollout_id, content.meta._asdict(), group=group) as folder:
        for name, part in content.parts.items():
            if isinstance(part, torch_files.Part):
                torch_files.write(part, folder / name)
            else:
                torch_dist.write(part, folder / name, group)
        (folder / "rng").mkdir(exist_ok=True)
        save_durably(content.rng, folder / "rng" / f"{dist.get_rank()}.pt")


def read_weights(folder: Path, chunk: Chunk, shape: ModelShape, *, is_critic: bool) -> None:
    """Read weights, whatever the format. Raises CheckpointError where they do not fit."""
    if is_torch_format(folder):
        torch_files.read_into(folder, chunk, shape, is_critic=is_critic)
    else:
        torch_dist.read_weights(folder, chunk.lms)


def read_optimizer(folder: Path, chunk: Chunk, optimizer: Any) -> None:
    """Read moments and step counts; learning rate, decay and betas stay as the settings say."""
    kept = ("lr", "weight_decay", "betas", "eps", "momentum")
    settings = [{name: group[name] for name in kept if name in group} for group in optimizer.param_groups]
    if is_torch_format(folder):
        torch_files.read_optimizer(folder, optimizer)
    else:
        torch_dist.read_optimizer(folder, chunk.lms, optimizer)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def random_numbers() -> dict[str, Any]:
    """The state of this rank's."""
    states = {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


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
