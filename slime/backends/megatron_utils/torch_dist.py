"""The state of a model as Megatron's torch_dist format holds it: readable at any parallelism."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._pytree import tree_leaves

from slime.backends.megatron_utils import optimizer_state
from slime.backends.megatron_utils.convert.torch_dist_file import Chunk, write_together
from slime.backends.megatron_utils.model import named
from slime.backends.shared.checkpoint import CheckpointError, reason_of


class Box(NamedTuple):
    """Where a tensor of this rank lies in the whole one. Lengths count leading axes that the tensor itself has not."""

    key: str
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Part(NamedTuple):
    """What this rank writes. tensors: one a box. objects: by key, serialised. common: the same on every rank."""

    boxes: tuple[Box, ...]
    tensors: list[Tensor]
    objects: dict[str, bytes]
    common: dict[str, Any]


def part_of(lms: list[GPTModel], optimizer: Any | None = None) -> Part:
    """Weights, and an optimizer's state with them, as they are now, not copied. A collective."""
    weights = _sharded(lms)
    state = {"checkpoint_version": 3.0, **weights}
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded(optimizer, _sharded(lms, by_layer=True))
    sharded, common = save_preprocess(state)
    own = [leaf for leaf in tree_leaves(sharded) if is_main_replica(leaf.replica_id)]
    tensors = [leaf for leaf in own if isinstance(leaf, ShardedTensor)]
    objects = {leaf.unique_key: _serialised(leaf.data) for leaf in own if isinstance(leaf, ShardedObject)}
    return Part(tuple(map(_box, tensors)), [leaf.data.detach() for leaf in tensors], objects, common)


def _sharded(lms: list[GPTModel], *, by_layer: bool = False) -> dict[str, Any]:
    """The weights of each stage; in a file their layers are counted over all.

    by_layer: each layer has tensors of its own, else those of all layers are one: only some may have optimizer state.
    """
    metadata = {"non_homogeneous_layers": True} if by_layer else None
    return named(lms, [lm.sharded_state_dict(metadata=metadata) for lm in lms])


def _box(leaf: ShardedTensor) -> Box:
    shape = (1,) * leaf.prepend_axis_num + tuple(leaf.local_shape)
    return Box(leaf.key, tuple(leaf.global_shape), tuple(leaf.global_offset), shape)


def _serialised(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save([value], buffer)
    return buffer.getvalue()


def write(part: Part, folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write a part to a new or an empty folder. A collective of `group`."""
    write_together(list(_chunks(part)), part.objects, part.common, folder, group=group)


def _chunks(part: Part) -> Iterator[Chunk]:
    for box, tensor in zip(part.boxes, part.tensors, strict=True):
        yield Chunk(*box, dtype=tensor.dtype, make=tensor.contiguous)


def read_weights(folder: Path, lms: list[GPTModel]) -> None:
    """Read weights into `lms`, whatever the ranks they were saved from. Raises CheckpointError where they don't fit."""
    weights = _sharded(lms)
    state = _load(folder, weights)
    for lm, name in zip(lms, weights, strict=True):
        lm.load_state_dict(state[name])


def read_optimizer(folder: Path, lms: list[GPTModel], optimizer: Any) -> None:
    """Read an optimizer's state, whatever the ranks it was saved from."""
    wanted = optimizer_state.sharded(optimizer, _sharded(lms, by_layer=True), is_loading=True)
    own = optimizer_state.outline(wanted)
    loaded = _load(folder, {"optimizer": optimizer_state.tensors_in(wanted)}).get("optimizer", {})
    optimizer.load_state_dict(optimizer_state.complete(own, loaded))


def _load(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointException, CheckpointingException, KeyError, ValueError) as error:
        if "optimizer" in wanted:
            what = "holds no optimizer such as this run's: pass --no-load-optim to start with a new one"
        else:
            what = "is a checkpoint of another model"
        reason = reason_of(error).partition(" not in state dict")[0]  # without the names of all tensors
        raise CheckpointError(f"{folder} {what} ({reason})") from error
    return state
