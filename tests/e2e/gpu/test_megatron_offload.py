"""--optimizer-cpu-offload on one NVIDIA GPU: where moments are, how much memory is free, and equal updates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_models import make_tiny_model

from slime.arguments import parse_args
from slime.backends.megatron_utils import host_moments
from slime.backends.megatron_utils.start import open_backend
from slime.utils.distributed import init_process_group
from slime.utils.http_utils import find_free_port

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU = torch.device("cuda", 0)
ROOMS = host_moments.NUM_ROOMS * 2 * 4 * host_moments.WAVE  # bytes


@pytest.fixture(scope="module")
def nccl_world() -> Iterator[None]:
    address = f"127.0.0.1:{find_free_port()}"
    init_process_group(backend="nccl", rank=0, world_size=1, address=address, timeout_minutes=2)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 million parameters: a dozen waves."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "vocab_size": 32000}
    path = tmp_path_factory.mktemp("model")
    return make_tiny_model(path, "qwen3", head_dim=64, initializer_range=0.02, dtype="bfloat16", **shape)


def loaded(model: Path, *flags: str) -> Any:
    args = parse_args(
        f"--train-backend megatron --hf-checkpoint {model} --prompt-data unread --rollout-batch-size 4 --colocate "
        "--n-samples-per-prompt 4 --num-rollout 4 --actor-num-gpus-per-node 1".split()
        + list(flags)
    )
    backend = open_backend(args, args, GPU)
    backend.load()
    return backend


def step(backend: Any, seed: int) -> float:
    """One update by random gradients. Returns its seconds."""
    from slime.backends.megatron_utils.optimizer import gradient_buffers, set_rates, step_if_finite

    for buffer in gradient_buffers(backend.chunk.wrapped):
        buffer.normal_(generator=torch.Generator(GPU).manual_seed(seed))
    set_rates(backend.optimizer, lr=1e-3, weight_decay=0.1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    assert not step_if_finite(backend.optimizer, clip_grad=0.0, is_loss_finite=True).skipped
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    backend.optimizer.zero_grad()
    return seconds


def moments_of(backend: Any) -> list[torch.Tensor]:
    """In the order of parameters."""
    from slime.backends.megatron_utils.optimizer import parts_of

    optimizers = [part.optimizer for part in parts_of(backend.optimizer)]
    states = [o.state[param] for o in optimizers for group in o.param_groups for param in group["params"]]
    return [state[name] for state in states for name in host_moments.NAMES]


def state_of(backend: Any) -> dict[str, torch.Tensor]:
    """Weights, float32 weights and moments, by name or number, on the host."""
    from slime.backends.megatron_utils.optimizer import parts_of

    parts = parts_of(backend.optimizer)
    params = [param for part in parts for group in part.param_groups for param in group["params"]]
    numbered = {f"main {number}": param for number, param in enumerate(params)}
    numbered |= {f"moment {number}": moment for number, moment in enumerate(moments_of(backend))}
    return {name: tensor.cpu() for name, tensor in (backend.chunk.weights() | numbered).items()}


def opened_and_stepped(model: Path, *flags: str) -> tuple[Any, int]:
    """A backend after a step, and the device memory that it holds."""
    before = torch.cuda.memory_allocated()
    backend = loaded(model, *flags)
    step(backend, 0)
    return backend, torch.cuda.memory_allocated() - before


@pytest.mark.parametrize("flags", [["--use-distributed-optimizer"], [], ["--no-bf16"]], ids=str)
def test_moments_are_on_the_host_and_updates_are_the_same(
    nccl_world: None, model: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, held = opened_and_stepped(model, *flags)
    ours, held_with = opened_and_stepped(model, *flags, "--optimizer-cpu-offload")
    moments = moments_of(ours)
    assert all(moment.is_pinned() and moment.device.type == "cpu" for moment in moments)
    num_bytes = sum(moment.nbytes for moment in moments)
    assert num_bytes > 4 * ROOMS  # each room is used several times
    assert held - held_with == pytest.approx(num_bytes, rel=0.01)
    torch.cuda.reset_peak_memory_stats()
    in_use = torch.cuda.memory_allocated()
    seconds = [(step(plain, seed), step(ours, seed)) for seed in range(1, 8)]
    assert torch.cuda.max_memory_allocated() - in_use < 1.2 * ROOMS
    expected, found = state_of(plain), state_of(ours)
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    without, with_it = (sorted(times)[len(times) // 2] * 1e3 for times in zip(*seconds, strict=True))
    rate = 2 * num_bytes / with_it / 1e6
    with capsys.disabled():
        print(
            f"\n{num_bytes / 2**20:.0f} MiB of moments: a step takes {with_it:.1f} ms, {rate:.1f} GB/s both ways "
            f"together, on the GPU {without:.1f} ms"
        )


def test_a_share_stays_on_the_gpu_and_a_night_moves_that_alone(nccl_world: None, model: Path) -> None:
    backend, _ = opened_and_stepped(model, "--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5")
    before = state_of(backend)
    where = {moment.data_ptr() for moment in moments_of(backend) if not moment.is_cuda}
    on_host = sum(moment.nbytes for moment in moments_of(backend) if not moment.is_cuda)
    assert 0.4 < on_host / sum(moment.nbytes for moment in moments_of(backend)) <= 0.5
    backend.sleep()
    num_stored = sum(len(host) for _, host in backend.host_copy._stored)
    assert num_stored < sum(tensor.nbytes for tensor in before.values()) - 0.9 * on_host
    backend.wake_up()
    assert where == {moment.data_ptr() for moment in moments_of(backend) if not moment.is_cuda}
    after = state_of(backend)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    step(backend, 1)
