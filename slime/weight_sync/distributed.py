"""The distributed transport: engines on other GPUs or nodes take buckets that one trainer broadcasts.

That trainer and all parts of all engines are a process group of their own, NCCL between GPUs and gloo between CPUs. It
is made at the first update and anew when an engine has gone, come or been restarted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from slime.engine.client import EngineClient, EngineError
from slime.utils.async_utils import run, submit
from slime.weight_sync.bucket import Bucket, in_buckets
from slime.weight_sync.engine_calls import is_loss
from slime.weight_sync.update_group import Failures, Member, UpdateGroup

logger = logging.getLogger(__name__)


class DistributedTransport:
    """Sends weights bucket by bucket: while one is broadcast, the trainers gather the next, and there is no third.

    is_sender: this rank holds full tensors and talks to the engines; the others only take part in gathering. device:
    where the tensors lie. No file is written: `path_of` is None.
    """

    def __init__(self, *, is_sender: bool, device: torch.device, bucket_bytes: int) -> None:
        self._is_sender = is_sender
        self._device = device
        self._bucket_bytes = bucket_bytes
        self.group: UpdateGroup | None = None

    def path_of(self, version: int) -> None:
        """There is no directory to start an engine from."""

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        engines: Sequence[EngineClient | None],
        version: int,
        timeout_s: float,
    ) -> list[EngineClient]:
        """As `Transport.send`; the sender's result. timeout_s: for one bucket to reach all engines."""
        if not self._is_sender:
            for _ in tensors:
                pass
            return []
        update = _Update(self, [engine for engine in engines if engine is not None], version, timeout_s)
        sending = submit(update.begin())
        for bucket in in_buckets(tensors, self._bucket_bytes):
            sending.result()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            sending = submit(update.deliver(bucket))
        sending.result()
        run(update.end())
        if update.error is not None:
            raise update.error
        return update.lost

    async def open_group(self, members: Sequence[Member], timeout_s: float) -> Failures:
        """Have a group with these engines: the one that there is, if it has just them."""
        if self.group is not None and self.group.members == members:
            return Failures({}, None)
        await self.close()
        group = UpdateGroup(members, self._device, timeout_s)
        if failures := await group.open():
            return failures
        self.group = group
        return failures

    async def close(self) -> None:
        """End the group, if there is one."""
        group, self.group = self.group, None
        if group is not None:
            await group.close()


class _Update:
    """One version on its way to the engines that are left. What fails is kept for the end, since trainers gather.

    A bucket during which an engine is lost is sent again to the others: they have all those before.
    """

    def __init__(
        self, transport: DistributedTransport, engines: Sequence[EngineClient], version: int, timeout_s: float
    ) -> None:
        self.lost: list[EngineClient] = []
        self.error: Exception | None = None
        self._transport = transport
        self._engines = list(engines)
        self._members: list[Member] = []
        self._version = version
        self._timeout_s = timeout_s

    async def begin(self) -> None:
        """Pause the engines, and learn what they are."""
        await self._each(lambda engine: engine.pause())
        await self._each(self._meet)
        self._members.sort(key=lambda member: self._engines.index(member.engine))

    async def deliver(self, bucket: Bucket) -> None:
        """Bring a bucket to every engine that is left."""
        while self._members and self.error is None:
            failures = await self._transport.open_group(self._members, self._timeout_s)
            if not failures:
                assert self._transport.group is not None
                failures = await self._transport.group.send(bucket, self._version if bucket.is_last else None)
            if not failures:
                return
            self._transport.group = None  # broken up
            self._note(failures)

    async def end(self) -> None:
        """Let the engines go on."""
        await self._each(lambda engine: engine.resume())

    async def _meet(self, engine: EngineClient) -> None:
        info = await engine.server_info()
        if int(info.get("pp_size", 1)) > 1:
            raise EngineError(f"{engine.url} has several pipeline stages: use --update-weight-transport disk")
        self._members.append(Member(engine, int(info.get("tp_size", 1)), str(info.get("startup_time"))))

    async def _each(self, call: Callable[[EngineClient], Awaitable[None]]) -> None:
        async def one(engine: EngineClient) -> None:
            async with asyncio.timeout(self._timeout_s):
                await call(engine)

        if self.error is None:
            results: list[Any] = await asyncio.gather(*map(one, self._engines), return_exceptions=True)
            pairs = zip(self._engines, results, strict=True)
            self._note(Failures({engine: error for engine, error in pairs if error is not None}, None))

    def _note(self, failures: Failures) -> None:
        """Leave out the engines that were lost. Where none was, or they are refused something, there is an error.

        A refusal beside a loss may be its consequence, and shows again if it is not.
        """
        lost = [engine for engine, error in failures.engines.items() if is_loss(error)]
        for engine in lost:
            logger.warning(
                "%s is lost on the way to weights v%d: %s", engine.url, self._version, failures.engines[engine]
            )
        self.lost += lost
        self._engines = [engine for engine in self._engines if engine not in lost]
        self._members = [member for member in self._members if member.engine not in lost]
        if failures and not lost:
            self.error = self._refusal(failures)

    def _refusal(self, failures: Failures) -> Exception:
        """What all engines say: one that refuses lets the others down, and which is which cannot be told from here."""
        if failures.engines:
            return EngineError("; ".join(str(error) for error in failures.engines.values()))
        urls = ", ".join(engine.url for engine in self._engines)
        return EngineError(f"weights v{self._version} could not be broadcast to {urls}: {failures.own}")
