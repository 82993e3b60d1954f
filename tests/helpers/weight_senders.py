"""How trainers send weights to an engine, written from the protocol: pickled in a request, or by broadcast."""

from __future__ import annotations

import base64
import io
import threading
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from helpers.embedded_engine import EngineUnderTest, free_port
from torch import Tensor
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, rendezvous

TIMEOUT = timedelta(seconds=60)
NamedTensors = list[tuple[str, Tensor]]


def flatten(named: NamedTensors) -> tuple[Tensor, list[SimpleNamespace]]:
    """All tensors as one of bytes, and where each lies; SGLang unpickles classes of Python, torch and its own only."""
    parts, metadata, place = [], [], 0
    for name, tensor in named:
        data = tensor.contiguous().view(-1).view(torch.uint8)
        end = place + data.numel()
        extent = {"start_idx": place, "end_idx": end, "numel": data.numel()}
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, **extent))
        parts.append(data)
        place = end
    return torch.cat(parts), metadata


def serialize(named: NamedTensors, load_format: str | None) -> str:
    """The base64 pickle of /update_weights_from_tensor; the tensors themselves are in shared memory."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    content: Any = [(name, tensor.clone()) for name, tensor in named]
    if load_format == "flattened_bucket":
        data, metadata = flatten(named)
        content = {"flattened_tensor": data, "metadata": metadata}
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(content)
    return base64.b64encode(buffer.getvalue()).decode()


class Broadcaster:
    """Rank 0 of a weight-update group with one engine."""

    def __init__(self, engine: EngineUnderTest) -> None:
        self._engine = engine
        port = free_port()
        self._name = f"group-{port}"
        body = {
            "master_address": "127.0.0.1",
            "master_port": port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": self._name,
            "backend": "gloo",
        }
        answers: list[Any] = []
        joining = threading.Thread(target=lambda: answers.append(engine.post("/init_weights_update_group", body)))
        joining.start()
        store, rank, world_size = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=TIMEOUT))
        self._group, _ = _new_process_group_helper(
            world_size,
            rank,
            [],
            Backend("gloo"),
            PrefixStore(self._name, store),
            group_name=self._name,
            backend_options=None,
            timeout=TIMEOUT,
        )
        joining.join()
        assert answers[0].status == 200, answers[0].raw

    def send(self, named: NamedTensors, load_format: str | None, *, version: str) -> None:
        """Broadcasts tensors, and tells the engine to take them."""
        body = {
            "names": [name for name, _ in named],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
            "shapes": [list(tensor.shape) for _, tensor in named],
            "group_name": self._name,
            "load_format": load_format,
            "weight_version": version,
        }
        answers: list[Any] = []
        taking = threading.Thread(
            target=lambda: answers.append(self._engine.post("/update_weights_from_distributed", body))
        )
        taking.start()
        tensors = [flatten(named)[0]] if load_format == "flattened_bucket" else [tensor for _, tensor in named]
        for tensor in tensors:
            self._group.broadcast(tensor.contiguous(), 0).wait()
        taking.join()
        assert answers[0].status == 200, answers[0].raw

    def close(self) -> None:
        """Ends the group on both sides."""
        answer = self._engine.post("/destroy_weights_update_group", {"group_name": self._name})
        assert answer.status == 200, answer.raw
        self._group.shutdown()
