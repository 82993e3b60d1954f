"""From a Megatron checkpoint, `torch_dist` or `torch`, to an HF directory."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from slime.backends.megatron_utils.convert.hf_to_torch_dist import TRACKER
from slime.backends.megatron_utils.convert.torch_dist_file import TorchDistReader
from slime.backends.megatron_utils.convert.torch_dist_keys import Slot, slots
from slime.backends.megatron_utils.convert.torch_format import Sharded, read_torch_format
from slime.backends.megatron_utils.names import (
    HFDirectory,
    Mapped,
    ModelShape,
    NameMapError,
    all_parameters,
    hf_tensors,
    read_shape,
)
from slime.weight_sync.disk import write_hf_directory

logger = logging.getLogger(__name__)
_NOT_WEIGHTS = ("optimizer.", "optimizer/", "chained_", "rng_state", "rerun_state", "common_state", "scheduler")


def megatron_to_hf(
    source: Path, target: Path, *, origin: Path, progress: Callable[[str], None] = lambda name: None
) -> None:
    """Write `target`, an HF directory; complete or absent.

    source: the folder of one checkpoint (`iter_0000010`, `release`), or the folder that its tracker lies in.
    origin: an HF directory of the same model: its config.json says what the model is, its config and tokenizer files
    are copied, and so are tensors that Megatron does not train (layers for multi-token prediction).
    Raises NameMapError, naming the tensor, where one is missing, unknown or of another shape; OSError where there is
    no room or `target` exists.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; nothing was written")
    folder = _checkpoint_folder(source)
    shape = read_shape(origin)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target.parent, shape, folder)
    tensors = _all_tensors(_parameters(folder, shape), shape, origin, progress)
    write_hf_directory(tensors, target, assets=str(origin), is_writer=True, is_durable=True)


def _checkpoint_folder(source: Path) -> Path:
    tracker = source / TRACKER
    folder = source
    if tracker.is_file():
        step = tracker.read_text().strip()
        if step != "release" and not step.isdigit():
            raise NameMapError(f"{tracker} must hold a step number or release, got {step!r}")
        folder = source / (step if step == "release" else f"iter_{int(step):07d}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")
    return folder


def _parameters(folder: Path, shape: ModelShape) -> Iterator[Sharded]:
    if (folder / ".metadata").is_file():
        return _from_torch_dist(TorchDistReader(folder), shape)
    if any(folder.glob("mp_rank_*")):
        return read_torch_format(folder, shape)
    raise NameMapError(
        f"{folder} holds neither a torch_dist checkpoint (.metadata) nor a torch one (mp_rank_*). For a run with FSDP "
        "--save-hf writes an HF directory at each save."
    )


def _from_torch_dist(reader: TorchDistReader, shape: ModelShape) -> Iterator[Sharded]:
    """Every parameter is found, and every key of the checkpoint accounted for, before the first is read."""
    unused = {key for key in reader.shapes if not key.startswith(_NOT_WEIGHTS) and "_extra_state" not in key}
    found: list[tuple[Mapped, Slot]] = []
    for parameter in all_parameters(shape):
        if parameter.is_copy:
            unused.discard(parameter.name)
            continue
        there = [
            slot
            for stacked in (True, False)
            for slot in slots(shape, parameter, stacked=stacked)
            if slot.key in reader.shapes
        ]
        if not there:
            raise NameMapError(f"parameter {parameter.name} is missing in the checkpoint")
        unused -= {slot.key for slot in there}
        found.append((parameter, there[0]))
    if ours := sorted(key for key in unused if not key.startswith("mtp.")):
        raise NameMapError(f"tensor {ours[0]} of the checkpoint is in no table of {shape.family}")
    if unused:
        logger.warning("%d tensors for multi-token prediction are taken from the original directory", len(unused))
    for parameter, slot in found:
        _check_shape(parameter, slot, reader.shapes[slot.key])
    for parameter, slot in found:
        own = parameter.local_shape(0)
        box = reader.read(slot.key, slot.position + (0,) * len(own), (1,) * len(slot.position) + own)
        yield Sharded(parameter, [box.reshape(own)])


def _check_shape(parameter: Mapped, slot: Slot, stored: tuple[int, ...]) -> None:
    expected = slot.lengths + parameter.local_shape(0)
    is_vocabulary = "layers" not in parameter.name and len(expected) == 2
    is_padded = is_vocabulary and len(stored) == 2 and stored[0] >= expected[0] and stored[1] == expected[1]
    if stored != expected and not is_padded:
        raise NameMapError(f"tensor {slot.key} has shape {stored}, config.json asks for {expected}")


def _all_tensors(
    parameters: Iterator[Sharded], shape: ModelShape, origin: Path, progress: Callable[[str], None]
) -> Iterator[tuple[str, Tensor]]:
    """Those that Megatron's parameters make up."""
    missing = {name for parameter in all_parameters(shape) for name, _ in parameter.hf}
    source = HFDirectory(origin) if any(origin.glob("*.safetensors")) else None
    has_tied_copy = source is not None and shape.tied and "lm_head.weight" in source.shapes
    for parameter, shards in parameters:
        progress(parameter.name)
        for name, tensor in hf_tensors(parameter, shards):
            missing.discard(name)
            yield name, tensor.contiguous()
            if name == "model.embed_tokens.weight" and has_tied_copy:
                yield "lm_head.weight", tensor.clone()
    if missing:
        raise NameMapError(f"tensor {min(missing)} is missing in the checkpoint")


def _check_room(directory: Path, shape: ModelShape, folder: Path) -> None:
    """The smaller of what the checkpoint's files hold (perhaps with an optimizer) and the weights in bfloat16."""
    weights = 2 * sum(math.prod(size) for parameter in all_parameters(shape) for _, size in parameter.hf)
    needed = min(weights, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(f"{directory} has {free / 2**30:.1f} GiB free; {needed / 2**30:.1f} GiB are needed")
