"""Tensors that reach the engine over a process group or pickled in a request, in SGLang's formats."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import pickle
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import rendezvous
from torch.multiprocessing import reductions

from slime.engine.embedded.weights import WeightsRefused
from slime.utils.distributed import join_group, leave_group

NamedTensors = list[tuple[str, Tensor]]

GROUP_TIMEOUT = timedelta(seconds=300)
"""How long a group waits for its other members, at its start and in each broadcast."""

POLL_S = 0.0005
"""Between two looks at a broadcast."""

SAFE_MODULES = ("torch", "collections", "multiprocessing.reduction", "multiprocessing.resource_sharer")
SAFE_BUILTINS = {
    "list",
    "dict",
    "tuple",
    "set",
    "int",
    "float",
    "bool",
    "str",
    "bytes",
    "bytearray",
    "slice",
    "complex",
}
UNSAFE_NAMES = {"load", "_load", "run", "system", "eval", "exec", "compile", "spawn", "popen"}


@dataclass
class FlattenedTensorMetadata:
    """Where a tensor lies in a bucket of bytes; the sender's class of this name, wherever defined, becomes this one."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class _Unpickler(pickle.Unpickler):
    """Loads tensors and plain containers; refuses everything else, since a pickle can name any code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "FlattenedTensorMetadata":
            return FlattenedTensorMetadata
        if (module, name) == ("types", "SimpleNamespace"):
            return SimpleNamespace
        if (module, name) == ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"):
            return _rebuild_cuda_tensor
        is_safe_module = any(module == safe or module.startswith(safe + ".") for safe in SAFE_MODULES)
        if (module == "builtins" and name in SAFE_BUILTINS) or (
            is_safe_module and name not in UNSAFE_NAMES and "." not in name
        ):
            return super().find_class(module, name)
        raise WeightsRefused(f"serialized_named_tensors may hold tensors only, not {module}.{name}.")


def _rebuild_cuda_tensor(*arguments: Any) -> Tensor:
    """As torch's, where the GPU may also be named by its UUID: the sender may number GPUs in another way."""
    rebuild: Any = reductions.rebuild_cuda_tensor
    place = rebuild.__code__.co_varnames.index("storage_device")
    device = arguments[place]
    if isinstance(device, str):
        uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
        if device not in uuids:
            raise WeightsRefused(f"the tensors lie on GPU {device}, which this engine does not see.")
        device = uuids.index(device)
    return cast(Tensor, rebuild(*arguments[:place], device, *arguments[place + 1 :]))


def unpack_tensors(payload: str, load_format: str | None) -> NamedTensors:
    """The named tensors of a base64 pickle: a list of (name, tensor), or for `flattened_bucket` bytes and metadata.

    Raises WeightsRefused where it is neither.
    """
    try:
        content = _Unpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()
    except (binascii.Error, pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise WeightsRefused(f"serialized_named_tensors cannot be read: {error}") from error
    if load_format == "flattened_bucket":
        if not isinstance(content, dict) or set(content) != {"flattened_tensor", "metadata"}:
            raise WeightsRefused("a flattened_bucket must hold flattened_tensor and metadata.")
        data = content["flattened_tensor"].view(torch.uint8)
        return [
            (item.name, _cut(data[item.start_idx : item.end_idx], item.dtype, item.shape))
            for item in content["metadata"]
        ]
    if load_format not in (None, "auto", "direct"):
        raise WeightsRefused(f"load_format must be flattened_bucket or absent, got {load_format!r}.")
    if not isinstance(content, list) or not all(isinstance(item, tuple) and len(item) == 2 for item in content):
        raise WeightsRefused("serialized_named_tensors must hold a list of (name, tensor).")
    return content


def _cut(data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(tuple(shape))


class UpdateGroups:
    """Process groups with trainers, by name: rank 0 is a trainer and sends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._groups: dict[str, ProcessGroup] = {}

    def join(self, name: str, *, address: str, rank: int, world_size: int, backend: str) -> None:
        """Joins a group; returns once all members have. Raises WeightsRefused if they do not in time."""
        if name in self._groups:
            raise WeightsRefused(f"the weight-update group {name!r} exists already.")
        try:
            store, rank, world_size = next(rendezvous(address, rank, world_size, timeout=GROUP_TIMEOUT))
            store.set_timeout(GROUP_TIMEOUT)
            self._groups[name] = join_group(
                name, store=store, rank=rank, world_size=world_size, backend=backend, timeout=GROUP_TIMEOUT
            )
        except (RuntimeError, ValueError) as error:
            raise WeightsRefused(f"the weight-update group {name!r} could not be joined: {error}") from error

    def leave(self, name: str) -> None:
        """Forgets a group, also while another thread receives in it. Raises WeightsRefused where there is none."""
        group = self._group(name)
        del self._groups[name]
        leave_group(group)

    def receive(
        self, name: str, names: list[str], dtypes: list[str], shapes: list[list[int]], *, flattened: bool
    ) -> NamedTensors:
        """What rank 0 broadcasts, one by one or as one bucket. Raises WeightsRefused if it does not come."""
        group = self._group(name)
        types = [_dtype(dtype) for dtype in dtypes]
        try:
            if flattened:
                return self._receive_bucket(name, names, types, shapes)
            tensors = [
                torch.empty(shape, dtype=dtype, device=self._device) for dtype, shape in zip(types, shapes, strict=True)
            ]
            self._wait(name, group, [group.broadcast(tensor, 0) for tensor in tensors])
        except RuntimeError as error:
            raise WeightsRefused(f"the broadcast in group {name!r} failed: {error}") from error
        return list(zip(names, tensors, strict=True))

    def _receive_bucket(
        self, group_name: str, names: list[str], types: list[torch.dtype], shapes: list[list[int]]
    ) -> NamedTensors:
        sizes = [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in zip(types, shapes, strict=True)]
        bucket = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        group = self._group(group_name)
        self._wait(group_name, group, [group.broadcast(bucket, 0)])
        parts = bucket.split(sizes)
        return [
            (name, _cut(part, dtype, shape))
            for name, part, dtype, shape in zip(names, parts, types, shapes, strict=True)
        ]

    def _wait(self, name: str, group: ProcessGroup, works: list[Any]) -> None:
        """Until all that was begun has come. Raises WeightsRefused if the group is left meanwhile."""
        while not all(work.is_completed() for work in works):
            if name not in self._groups:
                threading.Thread(target=_outlive, args=(group, works), daemon=True).start()
                raise WeightsRefused(f"the weight-update group {name!r} was left in the middle of a broadcast.")
            time.sleep(POLL_S)
        for work in works:
            work.wait()

    def _group(self, name: str) -> ProcessGroup:
        if name not in self._groups:
            raise WeightsRefused(f"there is no weight-update group {name!r}; POST /init_weights_update_group first.")
        return self._groups[name]


def _outlive(group: ProcessGroup, works: list[Any]) -> None:
    """Hold a group until what was begun in it has ended: gloo's destructor waits for that, and stops every thread."""
    for work in works:
        with contextlib.suppress(RuntimeError):
            work.wait()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise WeightsRefused(f"{name!r} is not a tensor type.")
    return dtype
