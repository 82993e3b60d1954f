"""Process groups with a deadline."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Store, distributed_c10d


def open_listener(host: str) -> socket.socket:
    """Listens at a free port of `host`, which nobody else can take before `init_process_group` gets it."""
    return socket.create_server((host, 0))


def init_process_group(
    *,
    backend: str,
    rank: int,
    world_size: int,
    address: str,
    timeout_minutes: float,
    listener: socket.socket | None = None,
) -> None:
    """Join the world of trainers. Raises a torch error naming the deadline.

    address: `host:port` of rank 0. listener: rank 0's at that address, which the world takes over.
    """
    timeout = datetime.timedelta(minutes=timeout_minutes)
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(
        host,
        int(port),
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def communication(setting: str, device: torch.device, *, cpu_backend: str | None = None) -> str:
    """What ranks talk through. setting: a backend's name, or `auto`. cpu_backend: for tensors on the host of a GPU."""
    backend = ("nccl" if device.type == "cuda" else "gloo") if setting == "auto" else setting
    return backend if cpu_backend is None or device.type == "cpu" else f"cpu:{cpu_backend},{device.type}:{backend}"


def pick_device(setting: str) -> torch.device:
    """`auto`: the GPU that this process may see first, else the CPU."""
    if setting == "cuda" or (setting == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def use_nccl_as_sglang_does() -> None:
    """Before the first NCCL group of this process: SGLang turns cuMem off, and all members must agree on it."""
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")


def join_group(
    name: str, *, store: Store, rank: int, world_size: int, backend: str, timeout: datetime.timedelta
) -> ProcessGroup:
    """A group beside the default one, or without it, among processes that share nothing but `store`.

    There is no public constructor in torch 2.11 to 2.13. SGLang's engines join as below, and the names of keys in the
    store must agree. Raises RuntimeError or ValueError where not all have joined in time.
    """
    c10d: Any = distributed_c10d
    with _failures_do_not_end_the_process():
        group, _ = c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            c10d.Backend(backend),
            dist.PrefixStore(name, store),
            group_name=name,
            backend_options=None,
            timeout=timeout,
        )
    c10d._world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return cast(ProcessGroup, group)


def leave_group(group: ProcessGroup) -> None:
    """End a group of `join_group`, whatever its members are doing: on GPUs a broadcast that hangs ends.

    With gloo it goes on until its own deadline, and connections close with the last reference to the group.
    """
    cast(Any, distributed_c10d)._abort_process_group(group)


@contextlib.contextmanager
def _failures_do_not_end_the_process() -> Iterator[None]:
    """NCCL groups made inside leave it to their owner to notice that a member is gone; torch would end the process."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    previous = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous
