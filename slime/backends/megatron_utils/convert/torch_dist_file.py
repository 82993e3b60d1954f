"""`torch_dist` checkpoints (torch.distributed.checkpoint files, and Megatron's `metadata.json`), a piece at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from slime.backends.shared.checkpoint import save_durably

FILE_BYTES = 2**30  # torch keeps what it writes to one file in memory until the file ends
_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}


@dataclass(frozen=True)
class Chunk:
    """A box of the tensor `key`. make: its data, made when it is written."""

    key: str
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(chunks: Iterable[Chunk], objects: Iterable[str], directory: Path) -> None:
    """Write a new directory; about `FILE_BYTES` of the chunks, or one chunk, are in memory at a time.

    objects: keys under which [None] is stored, as Megatron-core stores one empty object.
    """
    bins = list(_bins(chunks))
    writer = FileSystemWriter(directory, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)
    nothing = _plan((), objects)
    plans = [_plan(part, ()) for part in bins]
    plans, metadata = create_default_global_save_plan([*plans, nothing])
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    planner = _Streaming([chunk for part in bins for chunk in part], dict.fromkeys(objects, _nothing()))
    results = [writer.write_data(plan, planner).wait() for plan in plans]
    writer.finish(metadata, results)
    _complete(directory, {"checkpoint_version": 3.0, "iteration": 0})


def write_together(
    chunks: Sequence[Chunk],
    objects: Mapping[str, bytes],
    common: dict[str, Any],
    directory: Path,
    *,
    group: dist.ProcessGroup | None,
) -> None:
    """The same by all ranks of `group`, each its own chunks and objects; common: what is not sharded. A collective.

    objects: by key, as `torch.save` writes [object]. Raises torch's CheckpointException on every rank where one fails.
    """
    writer = _CompleteWriter(directory, common)
    planner = _Streaming(chunks, objects)
    torch.distributed.checkpoint.save({}, storage_writer=writer, planner=planner, process_group=group)


class _CompleteWriter(FileSystemWriter):
    def __init__(self, directory: Path, common: dict[str, Any]) -> None:
        super().__init__(directory, thread_count=1)
        self._directory = directory
        self._common = common

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written."""
        super().finish(metadata, results)
        _complete(self._directory, self._common)


def _complete(directory: Path, common: dict[str, Any]) -> None:
    save_durably(common, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_CONFIG | {"common_backend_version": 1}))


def _nothing() -> bytes:
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


def _plan(chunks: Iterable[Chunk], objects: Iterable[str]) -> SavePlan:
    empty = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
    return SavePlan([*(_item(chunk) for chunk in chunks), *empty])


def _bins(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    held: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if held and size + chunk.num_bytes > FILE_BYTES:
            yield held
            held, size = [], 0
        held.append(chunk)
        size += chunk.num_bytes
    yield held


def _item(chunk: Chunk) -> WriteItem:
    box = ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
    data = TensorWriteData(box, TensorProperties(chunk.dtype), torch.Size(chunk.full_shape))
    return WriteItem(MetadataIndex(chunk.key, box.offsets), WriteItemType.SHARD, tensor_data=data)


class _Streaming(DefaultSavePlanner):
    """Makes each tensor when torch is about to write it."""

    def __init__(self, chunks: Sequence[Chunk], objects: Mapping[str, bytes]) -> None:
        super().__init__(flatten_state_dict=False)
        self._chunks = {(chunk.key, chunk.offset): chunk for chunk in chunks}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        self.plan = _plan(self._chunks.values(), self._objects)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        assert write_item.index.offset is not None
        chunk = self._chunks[write_item.index.fqn, tuple(write_item.index.offset)]
        tensor = chunk.make()
        assert tensor.numel() == torch.Size(chunk.shape).numel(), chunk.key
        return tensor.reshape(chunk.shape)


class TorchDistReader:
    """An existing checkpoint, read box by box, whatever layout wrote it. shapes: full shapes by key."""

    def __init__(self, directory: Path) -> None:
        self._reader = FileSystemReader(directory)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {key: tuple(entry.size) for key, entry in self._tensors.items()}

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The box of `shape` at `offset`. Raises ValueError where the checkpoint's chunks do not cover it."""
        entry = self._tensors[key]
        target = torch.empty(shape, dtype=entry.properties.dtype)
        box = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, entry, [box])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise ValueError(f"the checkpoint holds only a part of {key} at {offset}")
        self._reader.read_data(LoadPlan(items), _Box(target)).wait()
        return target


class _Box(DefaultLoadPlanner):
    """Hands torch one tensor to read into."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError(f"{read_item.storage_index.fqn} is no tensor")
