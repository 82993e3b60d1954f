"""One weight update: pause -> send -> continue, with the version counted and, on demand, every tensor compared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from torch import Tensor

from slime.engine.client import EngineClient
from slime.utils.async_utils import run
from slime.utils.checksum import tensor_checksum
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
) -> None:
    """Bring every engine to `version`. A collective among trainers; the transport's writer talks to the engines.

    tensors: full tensors under Hugging Face names. check_equal: compare checksums of all tensors afterwards.
    Raises WeightMismatch naming engine and tensor.
    """
    checksums: dict[str, str] = {}
    source = _with_checksums(tensors, checksums) if check_equal else tensors
    transport.write(source, version)
    if not transport.is_writer:
        return
    run(_load(transport, engines, version, timeout_s))
    if check_equal:
        run(_compare(engines, checksums))


async def _load(
    transport: DiskTransport, engines: Sequence[EngineClient], version: int, timeout_s: float
) -> None:
    await asyncio.gather(*(engine.pause() for engine in engines))
    try:
        await transport.load_into(engines, version, timeout_s=timeout_s)
    finally:
        await asyncio.gather(*(engine.resume() for engine in engines))


def _with_checksums(
    tensors: Iterable[tuple[str, Tensor]], checksums: dict[str, str]
) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in tensors:
        checksums[name] = tensor_checksum(tensor)
        yield name, tensor


async def _compare(engines: Sequence[EngineClient], sent: dict[str, str]) -> None:
    for engine in engines:
        held = await engine.checksums()
        wrong = sorted(name for name, checksum in sent.items() if held.get(name) != checksum)
        if wrong:
            raise WeightMismatch(f"{engine.url} holds {len(wrong)} tensors that differ from those sent, first {wrong[0]}")
