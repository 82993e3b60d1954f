"""The state of a rank as Megatron's older torch format holds it: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`.

The ranks that hold the same share of a model write one file together. With the distributed optimizer `distrib_optim.pt`
beside it holds float32 weights and moments, gathered from the data-parallel ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.utils._pytree import tree_map

from slime.backends.megatron_utils.convert.torch_format import read_tensors, read_torch_format
from slime.backends.megatron_utils.model import Chunk, named, read_weights
from slime.backends.megatron_utils.names import ModelShape, NameMapError, hf_tensors
from slime.backends.megatron_utils.optimizer import parts_of
from slime.backends.shared.checkpoint import CheckpointError, save_durably

MODEL, OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"


class Part(NamedTuple):
    """What this rank writes: files by path. Where ranks hold the same share, the first of them has it."""

    files: dict[str, Any]


def part_of(lms: list[GPTModel], optimizer: Any | None = None, *, iteration: int) -> Part:
    """Weights, and an optimizer's state with them, as they are now, not copied. A collective."""
    state = {"checkpoint_version": 3.0, "iteration": iteration}
    state |= named(lms, [dict(lm.state_dict()) for lm in lms])
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    gathered = None if optimizer is None else _gathered(optimizer)
    folder = own_folder()
    folders = _of_every_rank(folder)
    writers = list(filter(None, _of_every_rank(None if gathered is None else folder)))
    assert len(set(writers)) == len(writers), f"several ranks would write one file: {writers}"
    files = {f"{folder}/{MODEL}": state} if folders.index(folder) == dist.get_rank() else {}
    return Part(files if gathered is None else files | {f"{folder}/{OPTIMIZER}": gathered})


def own_folder() -> str:
    """The name that Megatron gives this rank's folder."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return name


def _of_every_rank(value: str | None) -> list[str | None]:
    values: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _gathered(optimizer: Any) -> Any:
    """What the distributed optimizer keeps shared among data-parallel ranks, on the first of them; else None."""
    parts = parts_of(optimizer)
    if not any(hasattr(part, "get_parameter_state_dp_zero") for part in parts):
        return None
    states = [None if part.is_stub_optimizer else part.get_parameter_state_dp_zero() for part in parts]
    if all(state is None for state in states):
        return None
    return states[0] if len(states) == 1 else states


def write(part: Part, folder: Path) -> None:
    """Write a part to a new or an empty folder."""
    for name, state in part.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_durably(state, folder / name)


def read_into(folder: Path, chunk: Chunk, shape: ModelShape, *, is_critic: bool) -> None:
    """Read weights into the model; those of another layout through their Hugging Face names. A collective.

    Raises CheckpointError where they do not fit.
    """
    try:
        own = read_tensors(folder / own_folder() / MODEL) if _is_of_this_layout(folder) else {}
        stages = named(chunk.lms, [lm.state_dict() for lm in chunk.lms])
        if all(_shapes(own.get(name, {})) == _shapes(state) for name, state in stages.items()):
            _copy_into(stages, own)
        elif is_critic:
            raise NameMapError("a critic is read at the layout that it was saved at")
        else:
            read_weights(chunk, shape, _Resharded(folder, shape).read)
    except NameMapError as error:
        raise CheckpointError(f"{folder} cannot be read at this layout, or is of another model: {error}") from error


@torch.no_grad()
def _copy_into(stages: dict[str, Any], own: dict[str, Any]) -> None:
    for stage, state in stages.items():
        for name in _shapes(state):
            state[name].copy_(own[stage][name])


def _is_of_this_layout(folder: Path) -> bool:
    return {path.parent.name for path in folder.glob(f"mp_rank_*/{MODEL}")} == set(_of_every_rank(own_folder()))


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    named = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    return {name: value.shape for name, value in named.items() if isinstance(value, Tensor)}


class _Resharded:
    """The tensors of files that were saved at another layout, under Hugging Face names; a parameter at a time."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        found = [sharded for sharded in read_torch_format(folder, shape) if not sharded.parameter.is_copy]
        self._of = {name: sharded for sharded in found for name, _ in sharded.parameter.hf}
        self._joined: dict[str, Tensor] = {}

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Rows `start:stop` along `axis` of a tensor. Raises NameMapError for one that is not there."""
        if name not in self._of:
            raise NameMapError(f"tensor {name} is missing in the checkpoint")
        if name not in self._joined:
            self._joined = dict(hf_tensors(*self._of[name]))
        return self._joined[name].narrow(axis, start, stop - start)


@torch.no_grad()  # weights in float32 are leaves of which views are written
def read_optimizer(folder: Path, optimizer: Any) -> None:
    """Read an optimizer's state. Raises CheckpointError where it was saved at another layout, or not at all."""
    advice = "Pass --no-load-optim to start with a new one."
    if not _is_of_this_layout(folder):
        there = ", ".join(sorted(path.name for path in folder.glob("mp_rank_*")))
        raise CheckpointError(f"{folder}: the optimizer of {there} is read at that layout alone. {advice}")
    state = read_tensors(folder / own_folder() / MODEL).get("optimizer")
    is_distributed = any(hasattr(part, "get_parameter_state_dp_zero") for part in parts_of(optimizer))
    if state is None or is_distributed != any(folder.glob(f"mp_rank_*/{OPTIMIZER}")):
        raise CheckpointError(f"{folder} holds no optimizer such as this run's. {advice}")
    try:
        optimizer.load_state_dict(tree_map(_copied, state))
        if is_distributed:
            optimizer.load_parameter_state(str(folder / own_folder() / OPTIMIZER))
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} holds no optimizer such as this run's ({error}). {advice}") from error


def _copied(value: Any) -> Any:
    """Out of the mapped file."""
    return value.clone() if isinstance(value, Tensor) else value
