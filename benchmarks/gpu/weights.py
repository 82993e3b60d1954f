"""Weights from a trainer to a real SGLang server: seconds of an update, beside what the hardware allows.

    python -m benchmarks.gpu.weights [--shape qwen3-4B] [--train-backend megatron] [--updates 7] [--check] [--flags ...]

One rank holds float32 weights (of Megatron: bfloat16) and sends them in bfloat16: to an engine on the same GPU through
CUDA IPC (`tensor`), and, where there are two GPUs, to one on the other by NCCL (`distributed`). Medians of `updates`
whole updates, pause and resume included, after two warm-ups, the first of which makes the group. The limit is a copy on
the device, measured here, or the bytes over 363 GB/s, which NCCL was seen to broadcast between two H200. `gathering` is
what the trainer does alone: cast and lay end to end. Flags after --flags go to slime, those for SGLang (--sglang-X)
among them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.rollout import engine
from benchmarks.gpu.train import open_trainer
from scripts.random_checkpoint import SHAPES, write_checkpoint
from slime.arguments import Args, parse_args
from slime.engine.client import EngineClient
from slime.ray.process_host import HIGHEST_PORT
from slime.training.backend import TrainBackend
from slime.utils.distributed import init_process_group, use_nccl_as_sglang_does
from slime.utils.http_utils import find_free_port
from slime.weight_sync.bucket import in_buckets
from slime.weight_sync.disk import DiskTransport
from slime.weight_sync.distributed import DistributedTransport
from slime.weight_sync.tensor import TensorTransport
from slime.weight_sync.update import Transport, send_weights

BROADCAST_BYTES_PER_S = 363e9
WARM_UP = 2
DEADLINE_S = 120.0
COLUMNS = ("trainer", "transport", "GB", "median s", "all s", "GB/s", "gathering s", "limit s", "limit / median")
SLOTS = {"tensor": "--colocate", "distributed": "--rollout-num-gpus 1"}


def main() -> None:
    """Measures each way that this machine has, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="qwen3-4B", choices=SHAPES)
    parser.add_argument("--train-backend", default="fsdp", choices=["fsdp", "megatron"])
    parser.add_argument("--updates", type=int, default=7, help="that count")
    parser.add_argument("--check", action="store_true", help="after the first one compare all tensors on both sides")
    parser.add_argument("--logs", type=Path, default=Path("runs/benchmark-weights"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    table = Table(title=f"Seconds of a weight update, {options.shape} shape, bfloat16, one trainer and one engine")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    device = torch.device("cuda", 0)
    use_nccl_as_sglang_does()
    init_process_group(backend="nccl", rank=0, world_size=1, address=f"127.0.0.1:{find_free_port()}", timeout_minutes=5)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        write_checkpoint(options.shape, Path(folder, "model"))
        for kind in list(SLOTS)[: torch.cuda.device_count()]:
            table.add_row(*measure_kind(Path(folder, "model"), kind, device, options))
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    Console(width=140).print(table)


def measure_kind(model: Path, kind: str, device: torch.device, options: argparse.Namespace) -> list[str]:
    """A row of the table."""
    args = make_args(model, kind, options.train_backend, options.flags)
    backend = open_trainer(args, device)
    backend.load()
    port = find_free_port("127.0.0.1", highest=HIGHEST_PORT)
    with engine(args, port, options.logs / f"{options.train_backend}-{kind}.log", gpu=gpu_of_engine(kind)):
        client = EngineClient(f"http://127.0.0.1:{port}", is_sglang=True)
        seconds = measure(backend, args, make_transport(args, kind, device), client, options)
    return row(backend, args, seconds)


def make_args(model: Path, kind: str, train_backend: str, flags: list[str]) -> Args:
    """Settings of a run of one trainer and one engine."""
    return parse_args(
        f"--train-backend {train_backend} --hf-checkpoint {model} --prompt-data unread --rollout-batch-size 1 "
        f"--num-rollout 1 --n-samples-per-prompt 8 --actor-num-gpus-per-node 1 --use-dynamic-batch-size "
        f"--max-tokens-per-gpu 4096 "
        f"--rollout-engine sglang --update-weight-transport {kind} {SLOTS[kind]} --no-torch-compile "
        f"--sglang-mem-fraction-static 0.5".split()
        + flags
    )


def gpu_of_engine(kind: str) -> str:
    """The first GPU that this process sees, which is the trainer's, or the second."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return seen[0 if kind == "tensor" else 1]


def make_transport(args: Args, kind: str, device: torch.device) -> Transport:
    """That of the only rank."""
    size = args.update_weight_buffer_size
    if kind == "tensor":
        return TensorTransport(rank=0, ranks_per_engine=1, bucket_bytes=size)
    return DistributedTransport(is_sender=True, device=device, bucket_bytes=size)


def measure(
    backend: TrainBackend, args: Args, transport: Transport, client: EngineClient, options: argparse.Namespace
) -> list[float]:
    """Seconds of each update that counts. Raises RuntimeError where the engine is lost."""
    seconds = []
    for version in range(1, 1 + WARM_UP + options.updates):
        is_checked = options.check and version == 1
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            files = None
            if is_checked:
                disk = DiskTransport(Path(folder), assets=args.hf_checkpoint, is_writer=True)
                files = disk.write(backend.hf_tensors(), version)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            lost = send_weights(
                backend.hf_tensors(),
                transport,
                [client],
                version=version,
                timeout_s=DEADLINE_S,
                check_equal=is_checked,
                is_reporter=True,
                files=files,
            )
            seconds.append(time.perf_counter() - begin)
        if lost:
            raise RuntimeError(f"the engine was lost in update {version}; its log is in {options.logs}")
    return seconds[WARM_UP:]


def row(backend: TrainBackend, args: Args, seconds: list[float]) -> list[str]:
    """The columns of one backend and transport."""
    kind = args.update_weight_transport
    num_bytes, gathering = 0, []
    for _ in range(WARM_UP + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        buckets = in_buckets(backend.hf_tensors(), args.update_weight_buffer_size)
        num_bytes = sum(len(bucket.data) for bucket in buckets)
        torch.cuda.synchronize()
        gathering.append(time.perf_counter() - begin)
    limit = copy_s(num_bytes) if kind == "tensor" else num_bytes / BROADCAST_BYTES_PER_S
    middle = median(seconds)
    shown = " ".join(f"{value:.3f}" for value in seconds)
    numbers = [
        args.train_backend,
        kind,
        f"{num_bytes / 1e9:.2f}",
        f"{middle:.3f}",
        shown,
        f"{num_bytes / middle / 1e9:.0f}",
    ]
    return [*numbers, f"{gathering[-1]:.3f}", f"{limit:.3f}", f"{limit / middle:.2f}"]


def copy_s(num_bytes: int) -> float:
    """Seconds of a copy of that many bytes on the GPU, in pieces of a bucket, the second time."""
    source, target = (torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda") for _ in range(2))
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for start in range(0, num_bytes, len(source)):
            length = min(len(source), num_bytes - start)
            target[:length].copy_(source[:length])
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
