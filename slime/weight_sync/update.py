"""One weight update: pause -> send -> continue, with the version counted and, on demand, every tensor compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from slime.engine.client import EngineClient
from slime.utils.async_utils import run
from slime.utils.checksum import tensor_checksum
from slime.weight_sync.check import check_by_name, check_by_reloading, check_files


class Transport(Protocol):
    """How weights reach engines."""

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        engines: Sequence[EngineClient | None],
        version: int,
        timeout_s: float,
    ) -> list[EngineClient]:
        """Bring every engine to `version`, paused meanwhile. A collective among trainers; None stands for a lost one.

        Returns, to the reporter at least, the engines that could not be reached or hang. Raises EngineError or
        HTTPError where an engine refuses the weights, once no rank waits for another.
        """
        ...

    def path_of(self, version: int) -> Path | None:
        """A directory to start an engine from, if there is one."""
        ...


def send_weights(
    tensors: Iterable[tuple[str, Tensor]],
    transport: Transport,
    engines: Sequence[EngineClient | None],
    *,
    version: int,
    timeout_s: float,
    check_equal: bool,
    is_reporter: bool,
    files: Path | None = None,
) -> list[str]:
    """Bring every engine to `version`. A collective among trainers.

    tensors: full tensors under Hugging Face names. timeout_s: for one call of one engine. check_equal: the reporter
    compares checksums of all tensors afterwards. files: where the version lies for that, if a transport writes none.
    Returns the addresses of engines that were lost: to be started anew.
    Raises EngineError where an engine refuses the weights, WeightMismatch naming engine and tensor.
    """
    checksums: dict[str, str] = {}
    source = _with_checksums(tensors, checksums) if check_equal and is_reporter else tensors
    lost = transport.send(source, engines, version, timeout_s)
    if check_equal and is_reporter:
        reached = [engine for engine in engines if engine is not None and engine not in lost]
        directory = files if files is not None else transport.path_of(version)
        run(_compare(reached, checksums, directory, version=version, timeout_s=timeout_s))
    return [engine.url for engine in lost]


def _with_checksums(tensors: Iterable[tuple[str, Tensor]], checksums: dict[str, str]) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in tensors:
        checksums[name] = tensor_checksum(tensor)
        yield name, tensor


async def _compare(
    engines: Sequence[EngineClient], sent: dict[str, str], directory: Path | None, *, version: int, timeout_s: float
) -> None:
    if any(engine.is_sglang for engine in engines):
        assert directory is not None, "an SGLang engine is compared with files"
        check_files(directory, sent)
    for engine in engines:
        if engine.is_sglang and directory is not None:
            await check_by_reloading(engine, directory, version=version, timeout_s=timeout_s)
        else:
            await check_by_name(engine, sent)
