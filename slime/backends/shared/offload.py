"""Device memory of tensors given up and taken back: their bytes wait in page-locked host memory.

Storages are emptied in place, so that whoever holds a tensor (module, FSDP, optimizer) holds the same one afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

StateT = TypeVar("StateT")

ALIGNMENT = 512  # bytes; copies of page-locked memory run at full speed from there


class HostBuffer:
    """Room on the host that only grows; page-locked where there is a GPU, and exactly as large as it must be."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._is_locked = False

    def rooms(self, sizes: Iterable[int]) -> list[Tensor]:
        """uint8 views of `sizes` bytes, for whoever asked last."""
        sizes = list(sizes)
        offsets = [0, *itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        self._reserve(offsets[-1])
        return [self._bytes[offset : offset + size] for size, offset in zip(sizes, offsets, strict=False)]

    def _reserve(self, num_bytes: int) -> None:
        """torch's own page-locked allocator would round each tensor up to a power of two."""
        if len(self._bytes) >= num_bytes:
            return
        self._release()
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8).zero_()  # pages are touched by all threads, not by one
        if torch.cuda.is_available():
            result = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0)
            if int(result) != 0:
                size = f"{num_bytes / 2**30:.1f} GiB"
                raise MemoryError(f"{size} of host memory cannot be page-locked: CUDA error {result}")
            self._is_locked = True

    def _release(self) -> None:
        if self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._is_locked = False
        self._bytes = self._bytes[:0].clone()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # then torch is half gone, and the memory goes with the process
            self._release()


class HostCopy:
    """The storages of tensors on one GPU, kept on the host for a while."""

    def __init__(self) -> None:
        self._buffer = HostBuffer()
        self._stored: list[tuple[torch.UntypedStorage, Tensor]] = []

    def store(self, tensors: Iterable[Tensor]) -> int:
        """Copy the storages of CUDA tensors to the host and free them. Returns their bytes."""
        assert not self._stored, "stored twice"
        storages = _storages(tensors)
        rooms = self._buffer.rooms(storage.nbytes() for storage in storages)
        for storage, host in zip(storages, rooms, strict=True):
            host.copy_(_as_bytes(storage), non_blocking=True)
            self._stored.append((storage, host))
        if storages:
            torch.cuda.current_stream().synchronize()
        for storage in storages:
            storage.resize_(0)
        return sum(len(host) for host in rooms)

    def restore(self) -> None:
        """Bring back what is stored."""
        if not self._stored:  # a machine without GPUs
            return
        for storage, host in self._stored:
            storage.resize_(len(host))
            _as_bytes(storage).copy_(host, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        self._stored = []

    @contextlib.contextmanager
    def lend(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Those of the stored tensors that are among these, to be read for a while. Nothing where none is stored."""
        wanted = {_local(tensor).untyped_storage()._cdata for tensor in tensors}
        lent = [(storage, host) for storage, host in self._stored if storage._cdata in wanted]
        for storage, host in lent:
            storage.resize_(len(host))
            _as_bytes(storage).copy_(host, non_blocking=True)  # from page-locked memory: in the order of the stream
        try:
            yield
        finally:
            for storage, _ in lent:
                storage.resize_(0)


class Parking:
    """Frozen models that wait on the host while nobody uses them; where that is not wanted, nothing happens."""

    def __init__(self, *, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._copies: dict[str, HostCopy] = {}

    def park(self, name: str, model: nn.Module) -> None:
        """Move a model to the host."""
        if self._is_wanted:
            self._copies.setdefault(name, HostCopy()).store(_tensors(model))

    @contextlib.contextmanager
    def reading(self, name: str, model: nn.Module) -> Iterator[None]:
        """The model is on its device, and what is changed of it is lost."""
        with self._copies[name].lend(_tensors(model)) if name in self._copies else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def writing(self, name: str, model: nn.Module) -> Iterator[None]:
        """The model is on its device and may be changed; a new one is parked afterwards."""
        if name in self._copies:
            self._copies[name].restore()
        yield
        self.park(name, model)


def snapshot(state: StateT, buffer: HostBuffer) -> StateT:
    """`state`, a nest of containers, with a copy of every tensor in `buffer`: nothing changes it until the next one."""
    leaves, shape = tree_flatten(state)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    rooms = iter(buffer.rooms(_local(tensor).nbytes for tensor in tensors))
    copies = [_copied(leaf, next(rooms)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return cast(StateT, tree_unflatten(copies, shape))


def on_host(state: StateT) -> StateT:
    """`state` with a copy of every tensor in host memory of its own."""
    return cast(StateT, tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), state))


def alone(state: StateT) -> StateT:
    """`state` with tensors on the host that are all of their storages: of a view torch would write what is around it.

    Memory is shared, not copied, where it is the host's.
    """
    return cast(StateT, tree_map_only(Tensor, _alone, state))


def _alone(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    same_bytes = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return same_bytes.view(tensor.dtype).reshape(tensor.shape)


def _copied(tensor: Tensor, room: Tensor) -> Tensor:
    local = _local(tensor).detach()
    host = room.view(local.dtype).view(local.shape)
    host.copy_(local, non_blocking=True)
    return DTensor(host, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else host


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once; of a sharded tensor this rank's."""
    local = [_local(tensor) for tensor in tensors if tensor.is_cuda]
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in local}
    return [storage for pointer, storage in found.items() if pointer]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
