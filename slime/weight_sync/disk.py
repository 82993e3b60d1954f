"""The disk transport: weights go to the engines as a Hugging Face directory on a memory or shared file system."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slime.engine.client import EngineClient
from slime.utils.files import fsync_tree
from slime.utils.mtp import NO_NAMES, mtp_names
from slime.weight_sync.engine_calls import EngineCalls

SHARD_BYTES = 4 * 2**30
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", "*.gguf", "*.msgpack", "*.h5")


def write_hf_directory(
    tensors: Iterable[tuple[str, Tensor]], directory: Path, *, assets: str, is_writer: bool, is_durable: bool = False
) -> None:
    """Write a directory that `transformers` loads; complete or absent.

    tensors: full tensors under Hugging Face names; every rank iterates to the end, since gathering is a collective.
    assets: Hugging Face directory whose config and tokenizer files are copied, and whose layers for multi-token
    prediction, which nobody trains. is_writer: this rank writes.
    is_durable: force it to the disk before it gets its name.
    """
    if not is_writer:
        for _ in tensors:
            pass
        return
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_shards(chain(tensors, _mtp_tensors(Path(assets))), temporary)
        copy_assets(Path(assets), temporary)
        if is_durable:
            fsync_tree(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal shard, size
        path = directory / f"model-{len(shards) + 1:05d}.safetensors"
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:  # the library's own kind also for a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
        shards.append(list(shard))
        shard, size = {}, 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.cpu()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map = {name: f"model-{i + 1:05d}.safetensors" for i, names in enumerate(shards) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _mtp_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Of a Hugging Face directory; none where it holds no weights."""
    names = mtp_names(json.loads((directory / "config.json").read_text()))
    index = directory / "model.safetensors.index.json"
    if names.pattern == NO_NAMES:
        return
    listed = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ()
    for path in sorted({directory / name for name in listed} or directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in filter(names.fullmatch, file.keys()):
                yield name, file.get_tensor(name)


def copy_assets(source: Path, target: Path) -> None:
    """Config, tokenizer and remote code of a Hugging Face directory: everything that is not weights."""
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)


AfterWrite = Callable[[str, list[EngineClient]], object]
"""Called by the writer with a version's directory, complete, before the engines given are told of it."""


class DiskTransport:
    """Sends versions of the weights through folders `v000001`, `v000002`, ... and keeps the newest for restarts.

    keep: keeps all of them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        assets: str,
        is_writer: bool,
        keep: bool = False,
        after_write: AfterWrite | None = None,
    ) -> None:
        self.directory = directory
        self.assets = assets
        self.is_writer = is_writer
        self.keep = keep
        self.after_write = after_write

    def path_of(self, version: int) -> Path:
        """The folder of a version."""
        return self.directory / f"v{version:06d}"

    def write(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Path:
        """Write a version; a collective. Raises OSError where the file system is full."""
        path = self.path_of(version)
        write_hf_directory(tensors, path, assets=self.assets, is_writer=self.is_writer)
        return path

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        engines: Sequence[EngineClient | None],
        version: int,
        timeout_s: float,
    ) -> list[EngineClient]:
        """Write the version, have the engines load it, delete older ones. As `Transport.send`; the writer's result."""
        path = str(self.write(tensors, version).resolve())
        if not self.is_writer:
            return []
        there = [engine for engine in engines if engine is not None]
        if self.after_write is not None:
            self.after_write(path, there)
        calls = EngineCalls(there, timeout_s)
        calls.make(partial(_update, path=path, version=version, timeout_s=timeout_s))
        lost = calls.result()
        self.delete_before(version)
        return lost

    def delete_before(self, version: int) -> None:
        """Delete every version older than `version`, unless they are kept."""
        if self.keep:
            return
        newest = self.path_of(version).name
        for path in self.directory.glob("v*"):
            if path.name < newest:
                shutil.rmtree(path, ignore_errors=True)


async def _update(engine: EngineClient, *, path: str, version: int, timeout_s: float) -> None:
    await engine.pause()
    await engine.update_weights_from_disk(path, version=version, timeout_s=timeout_s)
    await engine.resume()
