"""Weights on GPUs: buckets through CUDA IPC on one, by NCCL between two; engines that die on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slime.engine.client import EngineClient
from slime.utils.async_utils import run
from slime.weight_sync.distributed import DistributedTransport
from slime.weight_sync.tensor import TensorTransport
from slime.weight_sync.update import Transport, send_weights
from tests.e2e.cpu.helpers.runs import Starter
from tests.helpers.embedded_engine import EngineUnderTest, running_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
requires_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="requires two GPUs")

DEADLINE_S = 20.0


def weights(model: Path, seed: int) -> dict[str, Tensor]:
    """Other ones of the same shapes, on the first GPU."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(model / "model.safetensors")
    return {name: (t + 0.1 * torch.randn(t.shape, generator=generator)).cuda(0) for name, t in tensors.items()}


def send(
    transport: Transport,
    engine: EngineUnderTest,
    model: Path,
    version: int,
    interrupt: Callable[[], None] | None = None,
) -> list[str]:
    """The addresses that were lost; one that was not holds all tensors. interrupt: called in the middle."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        named = list(weights(model, version).items())
        for index, pair in enumerate(named):
            if interrupt is not None and index == len(named) // 2:
                interrupt()
            yield pair

    return send_weights(
        tensors(),
        transport,
        [EngineClient(engine.url, timeout_s=DEADLINE_S)],
        version=version,
        timeout_s=DEADLINE_S,
        check_equal=True,
        is_reporter=True,
    )


@pytest.fixture
def broadcast() -> Iterator[DistributedTransport]:
    transport = DistributedTransport(is_sender=True, device=torch.device("cuda", 0), bucket_bytes=100_000)
    yield transport
    run(transport.close())


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes from here on see the second GPU only; this one sees both."""
    torch.cuda.init()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen[1])


def test_an_engine_on_the_same_gpu_takes_buckets_through_cuda_ipc(gpu_model: Path) -> None:
    transport = TensorTransport(rank=0, ranks_per_engine=1, bucket_bytes=100_000)
    with running_engine(gpu_model, "--device", "cuda") as engine:
        for version in (1, 2):
            assert send(transport, engine, gpu_model, version) == []
            assert engine.get("/model_info").json["weight_version"] == str(version)


@requires_two_gpus
def test_an_engine_on_another_gpu_takes_buckets_by_nccl(
    gpu_model: Path, broadcast: DistributedTransport, second_gpu: None
) -> None:
    with running_engine(gpu_model, "--device", "cuda") as engine:
        for version in (1, 2):
            assert send(broadcast, engine, gpu_model, version) == []
            assert engine.get("/model_info").json["weight_version"] == str(version)


@requires_two_gpus
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_is_gone_in_the_middle_of_a_broadcast_leaves_the_trainer_able_to_send_to_the_next(
    gpu_model: Path, broadcast: DistributedTransport, second_gpu: None, fault: signal.Signals
) -> None:
    with running_engine(gpu_model, "--device", "cuda") as engine:
        assert send(broadcast, engine, gpu_model, 1) == []
        begin = time.monotonic()
        assert send(broadcast, engine, gpu_model, 2, lambda: os.kill(engine.pid, fault)) == [engine.url]
        assert time.monotonic() - begin < 2 * DEADLINE_S
    with running_engine(gpu_model, "--device", "cuda") as engine:
        assert send(broadcast, engine, gpu_model, 3) == []


@requires_two_gpus
def test_sglang_on_another_gpu_than_the_trainer_takes_every_tensor(start: Starter) -> None:
    run = start(
        *("--no-colocate", "--rollout-num-gpus", "1", "--update-weight-transport", "distributed"),
        "--check-weight-update-equal",
    )
    run.succeeds(400.0)
    assert {v for sample in run.samples(1) for v in sample["weight_versions"]} == {"1"}
    run.leaves_nothing()
