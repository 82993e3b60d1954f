"""The process group of a trainer, its rank 0, with every part of some engines: what is broadcast reaches all at once.

Its start and each broadcast are a call to all engines and a blocking one of torch. When one of these fails, or at the
deadline, the group is broken up: members that wait for one that is gone are let go, and answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
import socket
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, TCPStore

from slime.engine.client import EngineClient, TensorShape, UpdateGroupAddress
from slime.utils.async_utils import in_thread
from slime.utils.distributed import join_group, leave_group
from slime.weight_sync.bucket import Bucket

LONGEST_GRACE_S = 10.0
"""For members of a group that was broken up to answer; those that do not are lost."""


class Member(NamedTuple):
    """An engine and its number of ranks. started: tells it from another process at the same address."""

    engine: EngineClient
    num_ranks: int
    started: str


class Failures(NamedTuple):
    """engines: those that did not do what they were told. own: why the trainer's side failed."""

    engines: dict[EngineClient, BaseException]
    own: BaseException | None

    def __bool__(self) -> bool:
        return bool(self.engines) or self.own is not None


class UpdateGroup:
    """One group. After a failure it is broken up and of no more use.

    timeout_s: for all members to join, and for each broadcast.
    """

    def __init__(self, members: Sequence[Member], device: torch.device, timeout_s: float) -> None:
        self.members = list(members)
        self._name = f"slime-weights-{secrets.token_hex(4)}"
        self._device = device
        self._timeout_s = timeout_s
        self._grace_s = min(LONGEST_GRACE_S, timeout_s / 4)  # twice at most: what hangs costs less than 2 * timeout_s
        self._store: TCPStore | None = None
        self._group: ProcessGroup | None = None
        self._stream: torch.cuda.Stream | None = cast(Any, torch.cuda).Stream(device) if device.type == "cuda" else None

    async def open(self) -> Failures:
        """Have every engine join."""
        try:
            host = own_address([member.engine.url for member in self.members])
            self._store, port = _serve_store(host, self._timeout_s)
        except (OSError, RuntimeError) as error:
            return Failures({}, error)
        last_ranks = list(accumulate((member.num_ranks for member in self.members), initial=0))
        backend = "gloo" if self._device.type == "cpu" else "nccl"
        address = UpdateGroupAddress(self._name, host, port, last_ranks[-1] + 1, backend)
        timeout_s = self._timeout_s + self._grace_s
        calls = {
            member.engine: member.engine.join_update_group(address, rank=last + 1, timeout_s=timeout_s)
            for member, last in zip(self.members, last_ranks, strict=False)
        }
        joining = in_thread(partial(_join, address, self._timeout_s))
        failures = await self._together(calls, joining)
        if joining.done() and joining.exception() is None:
            self._group = joining.result()
        if failures:
            await self._leave()
        return failures

    async def send(self, bucket: Bucket, version: int | None) -> Failures:
        """Have every engine take a bucket; version: with the last one. Its memory must stay until this returns."""
        assert self._group is not None
        tensors = [
            TensorShape(place.name, str(place.dtype).removeprefix("torch."), list(place.shape))
            for place in bucket.places
        ]
        calls = {
            member.engine: member.engine.update_weights_from_distributed(
                self._name, tensors, version=version, timeout_s=self._timeout_s + self._grace_s
            )
            for member in self.members
        }
        return await self._together(calls, in_thread(partial(_broadcast, self._group, bucket.data, self._stream)))

    async def close(self) -> None:
        """End the group on all sides; engines that are gone are no hindrance."""
        self._store = None  # whoever still waits to join hears of it
        leaving = [member.engine.leave_update_group(self._name, timeout_s=self._grace_s) for member in self.members]
        await asyncio.gather(*leaving, self._leave(), return_exceptions=True)

    async def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(in_thread(partial(leave_group, group))), self._grace_s)

    async def _together(self, calls: Mapping[EngineClient, Coroutine[Any, Any, None]], own: Future[Any]) -> Failures:
        """Wait for all; at the first failure and at the deadline break up the group, and see who answers then."""
        ours = asyncio.ensure_future(asyncio.wrap_future(own))
        tasks = {asyncio.ensure_future(call): engine for engine, call in calls.items()}
        everybody: set[asyncio.Future[Any]] = {ours, *tasks}
        await asyncio.wait(everybody, timeout=self._timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        if any(_error(task, 0) is not None for task in everybody):
            await self.close()
            await asyncio.wait(tasks, timeout=self._grace_s)
        errors = {engine: _error(task, self._timeout_s) for task, engine in tasks.items()}
        failures = Failures({e: error for e, error in errors.items() if error is not None}, _error(ours, self._grace_s))
        for task in everybody:
            task.cancel()
        return failures


def own_address(urls: Sequence[str]) -> str:
    """The address of this machine that all engines can reach: loopback where all of them lie on this machine.

    With engines on several machines, that of the way to the first of the others. Nothing is sent.
    """
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        assert parts.hostname is not None
        (family, _, _, _, target), *_ = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            addresses.append(str(probe.getsockname()[0]))
    return next((address for address in addresses if not _is_loopback(address)), addresses[0])


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _serve_store(host: str, timeout_s: float) -> tuple[TCPStore, int]:
    """Where the members meet, on a free port of `host` only. It ends with the last reference."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port: int = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _join(address: UpdateGroupAddress, timeout_s: float) -> ProcessGroup:
    """Rank 0 of the group, as a guest of the store: where that ends, so does this."""
    timeout = datetime.timedelta(seconds=timeout_s)
    store = TCPStore(address.host, address.port, is_master=False, timeout=timeout, wait_for_workers=False)
    return join_group(
        address.name, store=store, rank=0, world_size=address.world_size, backend=address.backend, timeout=timeout
    )


def _broadcast(group: ProcessGroup, data: Tensor, stream: torch.cuda.Stream | None) -> None:
    """Returns when the bytes have been sent. On a GPU in a stream of its own, which nobody else has to wait for."""
    if stream is None:
        group.broadcast(data, 0).wait()
        return
    torch.cuda.set_device(data.device)
    with torch.cuda.stream(stream):
        group.broadcast(data, 0).wait()
    stream.synchronize()


def _error(task: asyncio.Future[Any], waited_s: float) -> BaseException | None:
    if not task.done():
        return TimeoutError(f"no answer within {waited_s:g} s")
    return task.exception()
