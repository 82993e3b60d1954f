"""Device memory of tensors given up and taken back: their bytes wait in page-locked host memory.

Storages are emptied in place, so that whoever holds a tensor (module, FSDP, optimizer) holds the same one afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

ALIGNMENT = 512  # bytes; copies of page-locked memory run at full speed from there


class HostCopy:
    """Room on the host for the storages of tensors on one GPU; page-locked once, exactly as large as it must be."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._stored: list[tuple[torch.UntypedStorage, Tensor]] = []

    def store(self, tensors: Iterable[Tensor]) -> int:
        """Copy the storages of CUDA tensors to the host and free them. Returns their bytes."""
        assert not self._stored, "stored twice"
        storages = _storages(tensors)
        offsets = [0]
        for storage in storages:
            offsets.append(offsets[-1] + -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT)
        self._reserve(offsets[-1])
        for storage, offset in zip(storages, offsets, strict=False):
            host = self._buffer[offset : offset + storage.nbytes()]
            host.copy_(_as_bytes(storage), non_blocking=True)
            self._stored.append((storage, host))
        torch.cuda.current_stream().synchronize()
        for storage in storages:
            storage.resize_(0)
        return offsets[-1]

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
            _as_bytes(storage).copy_(host)
        try:
            yield
        finally:
            for storage, _ in lent:
                storage.resize_(0)

    def _reserve(self, num_bytes: int) -> None:
        """torch's own page-locked allocator would round each tensor up to a power of two."""
        if len(self._buffer) >= num_bytes:
            return
        self._release()
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8).zero_()  # pages are touched by all threads, not by one
        result = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), num_bytes, 0)
        if int(result) != 0:
            raise MemoryError(f"{num_bytes / 2**30:.1f} GiB of host memory cannot be page-locked: CUDA error {result}")

    def _release(self) -> None:
        if len(self._buffer):
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
            self._buffer = self._buffer[:0].clone()

    def __del__(self) -> None:
        self._release()


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once; of a sharded tensor this rank's."""
    local = [_local(tensor) for tensor in tensors if tensor.is_cuda]
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in local}
    return [storage for pointer, storage in found.items() if pointer]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
