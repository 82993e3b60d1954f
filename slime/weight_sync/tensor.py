"""The tensor transport: an engine reads the memory of the trainers on its GPUs, through CUDA IPC.

What is sent is a base64 pickle in SGLang's format `flattened_bucket`: handles, names and places. A GPU is named by its
UUID, since either process may number the GPUs it sees in another way.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import reductions

from slime.engine.client import EngineClient
from slime.weight_sync.bucket import Bucket, in_buckets
from slime.weight_sync.engine_calls import EngineCalls

DEVICE_ARGUMENT = 6
"""Where torch's recipe for a CUDA tensor holds the number of its GPU."""


class _Pickler(ForkingPickler):
    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        rebuild, arguments = cast(Any, reductions).reduce_tensor(obj)
        uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
        return rebuild, (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])


def serialize(bucket: Bucket) -> str:
    """A bucket on a GPU for /update_weights_from_tensor. Its memory must stay until the engine has answered."""
    torch.cuda.current_stream(bucket.data.device).synchronize()
    metadata = [
        SimpleNamespace(
            name=place.name,
            shape=place.shape,
            dtype=place.dtype,
            start_idx=place.start,
            end_idx=place.end,
            numel=place.end - place.start,
        )
        for place in bucket.places
    ]
    buffer = io.BytesIO()
    _Pickler(buffer).dump({"flattened_tensor": bucket.data, "metadata": metadata})
    return base64.b64encode(buffer.getvalue()).decode()


class TensorTransport:
    """Sends weights bucket by bucket; while an engine reads one, the trainers gather the next.

    Rank r shares its slot with part r % `ranks_per_engine` of engine r // `ranks_per_engine`. The first rank of each
    engine talks to it. No file is written: `path_of` is None.
    """

    def __init__(self, *, rank: int, ranks_per_engine: int, bucket_bytes: int) -> None:
        """A collective among trainers."""
        self.engine_index, self._part = divmod(rank, ranks_per_engine)
        self._bucket_bytes = bucket_bytes
        self._size = ranks_per_engine
        self._group: dist.ProcessGroup | None = None
        if ranks_per_engine > 1:
            every = range(0, dist.get_world_size(), ranks_per_engine)
            groups = [dist.new_group(list(range(first, first + ranks_per_engine)), backend="gloo") for first in every]
            self._group = groups[self.engine_index]

    def path_of(self, version: int) -> None:
        """There is no directory to start an engine from."""

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        engines: Sequence[EngineClient | None],
        version: int,
        timeout_s: float,
    ) -> list[EngineClient]:
        """Bring the engines to `version`; those that are None are left out. Returns those that were lost on the way."""
        engine = engines[self.engine_index] if self._part == 0 else None
        calls = EngineCalls([engine] if engine is not None else [], timeout_s)
        calls.make(lambda engine: engine.pause())
        previous: Bucket | None = None  # the engine may still read it
        for bucket in in_buckets(tensors, self._bucket_bytes):
            payloads = self._gather(serialize(bucket))
            calls.finish()
            self._meet()
            previous = bucket
            calls.begin(
                partial(_load, payloads=payloads, version=version if bucket.is_last else None, timeout_s=timeout_s)
            )
        calls.finish()
        self._meet()
        del previous
        calls.make(lambda engine: engine.resume())
        return self._everybodys(calls.result())

    def _gather(self, payload: str) -> list[str]:
        """The payloads of all parts of this rank's engine, on its first rank."""
        if self._group is None:
            return [payload]
        payloads: list[str | None] = [None] * self._size
        dist.all_gather_object(payloads, payload, group=self._group)
        return [payload for payload in payloads if payload is not None]

    def _meet(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)

    def _everybodys(self, lost: list[EngineClient]) -> list[EngineClient]:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return lost
        everybodys: list[list[EngineClient]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everybodys, lost)
        return [engine for engines in everybodys for engine in engines]


async def _load(engine: EngineClient, *, payloads: list[str], version: int | None, timeout_s: float) -> None:
    await engine.update_weights_from_tensor(payloads, version=version, timeout_s=timeout_s)
