"""One weight update: pause -> send -> continue, with the version counted and, on demand, every tensor compared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from torch import Tensor

from slime.engine.client import EngineClient
from slime.utils.async_utils import run
from slime.utils.checksum import tensor_checksum
from slime.utils.http_utils import HTTPError
from slime.weight_sync.disk import DiskTransport


class WeightMismatch(RuntimeError):
    """An engine holds other weights than were sent."""


def send_weights(
    tensors: Iterable[tuple[str, Tensor]],
    transport: DiskTransport,
    engines: Sequence[EngineClient],
    *,
    version: int,
    timeout_s: float,
    check_equal: bool,
) -> list[str]:
    """Bring every engine to `version`. A collective among trainers; the transport's writer talks to the engines.

    tensors: full tensors under Hugging Face names. timeout_s: for one engine to take them. check_equal: compare
    checksums of all tensors afterwards. Returns the addresses of engines that could not be reached or hang: they are to
    be restarted from the version's directory.
    Raises EngineError where an engine refuses the weights, WeightMismatch naming engine and tensor.
    """
    checksums: dict[str, str] = {}
    source = _with_checksums(tensors, checksums) if check_equal else tensors
    transport.write(source, version)
    if not transport.is_writer:
        return []
    lost = run(_update_all(transport, engines, version, timeout_s))
    if check_equal:
        run(_compare([engine for engine in engines if engine not in lost], checksums))
    return [engine.url for engine in lost]


async def _update_all(
    transport: DiskTransport, engines: Sequence[EngineClient], version: int, timeout_s: float
) -> list[EngineClient]:
    """The engines that were lost on the way."""
    results = await asyncio.gather(
        *(_update(engine, transport, version, timeout_s) for engine in engines), return_exceptions=True
    )
    for error in results:
        is_lost = isinstance(error, TimeoutError) or (isinstance(error, HTTPError) and error.is_lost)
        if isinstance(error, BaseException) and not is_lost:
            raise error
    transport.delete_before(version)
    return [engine for engine, error in zip(engines, results, strict=True) if error is not None]


async def _update(engine: EngineClient, transport: DiskTransport, version: int, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        await engine.pause()
        await transport.load_into(engine, version, timeout_s=timeout_s)
        await engine.resume()


def _with_checksums(tensors: Iterable[tuple[str, Tensor]], checksums: dict[str, str]) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in tensors:
        checksums[name] = tensor_checksum(tensor)
        yield name, tensor


async def _compare(engines: Sequence[EngineClient], sent: dict[str, str]) -> None:
    for engine in engines:
        held = await engine.checksums()
        wrong = sorted(name for name in sent.keys() | held.keys() if sent.get(name) != held.get(name))
        if wrong:
            raise WeightMismatch(
                f"{engine.url} holds {len(wrong)} tensors that differ from those sent, first {wrong[0]}"
            )
