"""Whether an engine holds the weights that were sent: checksums of every tensor on both sides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from slime.engine.client import EngineClient
from slime.utils.checksum import tensor_checksum
from slime.utils.mtp import mtp_names


class WeightMismatch(RuntimeError):
    """An engine holds other weights than were sent."""


async def check_by_name(engine: EngineClient, sent: Mapping[str, str]) -> None:
    """Compare an engine that names its tensors as checkpoints do. Raises WeightMismatch.

    sent: `tensor_checksum` of each tensor under its Hugging Face name.
    """
    _check_equal(f"{engine.url} holds", "sent", sent, await engine.checksums())


async def check_by_reloading(engine: EngineClient, directory: Path, *, version: int, timeout_s: float) -> None:
    """Compare what SGLang got with what it loads from the same version's directory, over noise. Raises WeightMismatch.

    Its tensors lie fused, split over ranks and under names of its own, so its loader is what they are compared by. What
    an update does not reach keeps its values in the first checksums and noise in the second.
    """
    await engine.pause()
    got = await engine.shard_checksums()
    await engine.scramble_weights()
    await engine.update_weights_from_disk(str(directory.resolve()), version=version, timeout_s=timeout_s)
    loaded = await engine.shard_checksums()
    await engine.resume()
    _check_equal(f"{engine.url} holds", "that it loads from a checkpoint", loaded, got)


def check_files(directory: Path, sent: Mapping[str, str]) -> None:
    """Compare the tensors of a Hugging Face directory, but for MTP layers, with those sent. Raises WeightMismatch."""
    is_mtp = mtp_names(json.loads((directory / "config.json").read_text())).fullmatch
    written = {
        name: tensor_checksum(tensor)
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
        if not is_mtp(name)
    }
    _check_equal(f"{directory} holds", "sent", sent, written)


def _check_equal(holder: str, others: str, expected: Mapping[str, str], held: Mapping[str, str]) -> None:
    wrong = sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name))
    if wrong:
        raise WeightMismatch(f"{holder} {len(wrong)} tensors that differ from those {others}, first {wrong[0]}")
