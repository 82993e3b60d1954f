"""Sharded checkpoints that are complete or absent, readable at any number of ranks.

SAVE/
|-- latest_checkpointed_iteration.txt     the last complete step, written last
|-- iter_0000010/
    |-- model/ optimizer/                 torch.distributed.checkpoint
    |-- ref/ old_actor/                   where the run moved them: `copy_weights`
    |-- rng.pt  meta.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from slime.backends.shared.checkpoint import (
    META,
    TRACKER,
    CheckpointError,
    iteration_folder,
    new_checkpoint,
    save_durably,
)


class Meta(NamedTuple):
    """What a checkpoint says of itself.

    num_steps: of the optimizer. loss_scale: of float16, and its good steps. schedule: of the learning rate.
    """

    rollout_id: int
    num_steps: int
    loss_scale: tuple[float, int] | None = None
    schedule: dict[str, Any] | None = None


def find_checkpoint(root: str | None, step: int | None) -> Path | None:
    """The folder of step `step`, or of the last complete one; None where `root` holds no checkpoint.

    root: a folder of checkpoints; without a step it may be that of one checkpoint.
    Raises CheckpointError where a step is asked for, or promised by the tracker, that is not there.
    """
    if root is None:
        return None
    tracker = Path(root) / TRACKER
    if step is None and is_complete(Path(root)):
        return Path(root)
    if step is None:
        if not tracker.is_file():
            return None
        text = tracker.read_text().strip()
        if not text.isdigit():
            raise CheckpointError(f"{tracker} must hold a step number, got {text!r}")
        step = int(text)
    folder = iteration_folder(root, step)
    if not is_complete(folder):
        there = sorted(path.name for path in Path(root).glob("iter_*"))
        raise CheckpointError(f"there is no complete checkpoint {folder}; present: {', '.join(there) or 'none'}")
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint lies there."""
    return (folder / META).is_file()


class Content(NamedTuple):
    """What is written of a run. parts: state dicts by the folder of each. rng: of torch."""

    meta: Meta
    parts: dict[str, dict[str, Any]]
    rng: torch.Tensor


def content_of(
    meta: Meta, model: nn.Module, optimizer: torch.optim.Optimizer | None, copies: Mapping[str, nn.Module]
) -> Content:
    """The state as it is now, not copied. optimizer: None leaves it out. copies: further models, by name."""
    members = {"model": model, **copies}
    parts: dict[str, dict[str, Any]] = {part: {"model": get_model_state_dict(m)} for part, m in members.items()}
    if optimizer is not None:
        parts["optimizer"] = {"optimizer": _optimizer_state(model, optimizer)}
    return Content(meta, parts, torch.get_rng_state())


def save(root: str, content: Content, group: dist.ProcessGroup | None = None) -> None:
    """Write a checkpoint. A collective of `group`, which has all ranks; None: the default one."""
    with new_checkpoint(root, content.meta.rollout_id, content.meta._asdict(), group=group) as folder:
        for part, state in content.parts.items():
            dcp.save(state, checkpoint_id=folder / part, process_group=group)
        if dist.get_rank() == 0:
            save_durably({"torch": content.rng}, folder / "rng.pt")


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state to save. Of an optimizer that took no step yet (the actor's, while only the critic learns) torch makes
    one by a step with gradients of zero, which it counts: here, and in what is saved, it does not count."""
    is_new = not optimizer.state
    state = get_optimizer_state_dict(model, optimizer)
    if not is_new:
        return state
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    return get_optimizer_state_dict(model, optimizer)


def load_model(folder: Path, model: nn.Module, *, part: str = "model") -> None:
    """Read weights into `model`, whatever the number of ranks they were saved from. part: "model", or a copy's name."""
    state = {"model": get_model_state_dict(model)}
    _check_fits(folder / part, state["model"])
    with _errors_of_ranks(f"{folder} cannot be read"):
        dcp.load(state, checkpoint_id=folder / part)
    set_model_state_dict(model, state["model"])


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimizer's moments and step counts; learning rate, decay and betas stay as the settings say."""
    if not (folder / "optimizer").is_dir():
        raise CheckpointError(f"{folder} was saved without its optimizer: pass --no-load-optim to start with a new one")
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    with _errors_of_ranks(f"{folder} cannot be read"):
        dcp.load(state, checkpoint_id=folder / "optimizer")
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def load_rng(folder: Path) -> None:
    """Restore the state of torch's random numbers."""
    torch.set_rng_state(torch.load(folder / "rng.pt", weights_only=True)["torch"])


def read_meta(folder: Path) -> Meta:
    """What the checkpoint says of itself."""
    return Meta(**json.loads((folder / META).read_text()))


@contextmanager
def _errors_of_ranks(what: str) -> Iterator[None]:
    """Turn what torch raises, a BaseException with a traceback of every rank, into one sentence."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error


def _check_fits(folder: Path, state: dict[str, Any]) -> None:
    """Raise CheckpointError, naming the first tensor that is missing, left over or of another shape."""
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, tensor in state.items():
        entry = saved.get(f"model.{name}")
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder} has no tensor {name}: it is a checkpoint of another model")
        if tuple(entry.size) != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {tuple(entry.size)}, the model wants {tuple(tensor.shape)}"
            )
    if left_over := sorted(saved.keys() - {f"model.{name}" for name in state}):
        raise CheckpointError(f"{folder}: the model has no tensor {left_over[0].removeprefix('model.')}")
