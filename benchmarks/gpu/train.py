"""Training on one GPU: tokens/s and model-FLOPs utilisation, memory of log-probs, sleep and wake-up.

    python -m benchmarks.gpu.train [--shapes qwen3-0.6B qwen3-4B] [--steps 5] [--variants ...]

One micro-batch of 16,384 tokens in sequences of 2,048, all but the first of each a response token; forward, backward,
clipping and AdamW with float32 master weights and bfloat16 products. The median of `steps` steps after two warm-ups.
Utilisation counts what the model's formula asks for (no recomputation), against the 989 TFLOP/s of an H100 or H200.
Weights are random: the time does not depend on them. Sleep and wake-up stand beside copies of page-locked memory that
are measured here.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from scripts.random_checkpoint import SHAPES, write_checkpoint
from slime.algorithms.reduce import SequenceSum
from slime.arguments import Args, parse_args
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.megatron_utils.start import open_backend
from slime.data.batch import batch_from_samples
from slime.data.packed import PackedBatch, pack_rows
from slime.observability.flops import training_flops
from slime.training.backend import LossOutput, TokenOutputs, TrainBackend, Wants
from slime.utils.distributed import init_process_group
from slime.utils.http_utils import find_free_port
from slime.utils.types import Sample

if TYPE_CHECKING:
    from slime.backends.megatron_utils.backend import MegatronBackend

PEAK_FLOPS = 989e12
COPY_BYTES = 2**31
TOKENS, LENGTH = 16_384, 2_048
SLEEP = ("GiB", "sleep s", "wake s", "pinned GB/s", "share of it", "left GiB")
VARIANTS = {
    "plain": ["--no-torch-compile"],
    "recompute": ["--no-torch-compile", "--gradient-checkpointing"],
    "compiled": ["--torch-compile"],
    "compiled, recompute": ["--torch-compile", "--gradient-checkpointing"],
}


def main() -> None:
    """Runs all shapes and variants and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6B", "qwen3-4B"], choices=SHAPES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of slime")
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    init_process_group(backend="nccl", rank=0, world_size=1, address=f"127.0.0.1:{find_free_port()}", timeout_minutes=5)
    table = Table(title="Training, 16k tokens")
    memory = Table(title="Log-probs of 16k tokens")
    sleep = Table(title="Sleep and wake-up, the second time")
    add_columns(table, "shape", "variant", "s/step", "tokens/s", "MFU", "peak GiB", "first step s")
    add_columns(memory, "shape", "direction", "chunk", "ms", "peak MB beyond inputs")
    add_columns(sleep, "shape", *SLEEP)
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(shape, Path(folder, "model"))
            config = json.loads(Path(folder, "model", "config.json").read_text())
            for variant in args.variants:
                backend = None
                gc.collect()
                torch.cuda.empty_cache()
                torch._dynamo.reset()
                try:
                    backend = make_backend(Path(folder, "model"), device, [*VARIANTS[variant], *args.flags])
                    table.add_row(shape, variant, *measure_steps(backend, config, args.steps))
                except torch.cuda.OutOfMemoryError:
                    table.add_row(shape, variant, "out of memory")
            if backend is not None:
                for row in measure_log_probs(backend):
                    memory.add_row(shape, *row)
                sleep.add_row(shape, *measure_sleep(backend))
            del backend
    dist.destroy_process_group()
    for printed in (table, memory, sleep):
        Console(width=120).print(printed)


def add_columns(table: Table, *names: str) -> None:
    """Columns of these names."""
    for name in names:
        table.add_column(name)


def make_backend(model: Path, device: torch.device, flags: list[str]) -> FSDPBackend:
    """A loaded FSDP backend of one rank."""
    backend = open_trainer(settings(model, "fsdp", flags), device)
    backend.load()
    assert isinstance(backend, FSDPBackend)
    return backend


def settings(model: Path, train_backend: str, flags: list[str]) -> Args:
    """Those of one rank; flags come last."""
    return parse_args(
        f"--train-backend {train_backend} --hf-checkpoint {model} --prompt-data unread --rollout-batch-size 1 "
        f"--num-rollout 1 --n-samples-per-prompt 8 --colocate --actor-num-gpus-per-node 1 --use-dynamic-batch-size "
        f"--max-tokens-per-gpu {TOKENS} --lr 1e-6".split()
        + flags
    )


def open_trainer(args: Args, device: torch.device) -> TrainBackend:
    """This rank's backend, not yet loaded."""
    if args.train_backend == "megatron":
        return open_backend(args, args, device, torch_compile=args.torch_compile)
    return FSDPBackend(args, args, device)


def make_batch(vocab_size: int) -> PackedBatch:
    """Eight sequences of random tokens."""
    rng = np.random.default_rng(0)
    samples = [
        Sample(group_index=0, tokens=rng.integers(0, vocab_size, LENGTH).tolist(), response_length=LENGTH - 1)
        for _ in range(TOKENS // LENGTH)
    ]
    batch = batch_from_samples(samples, [0.0] * len(samples))
    return pack_rows(batch, range(len(batch)), batch.loss_mask / batch.loss_mask.sum())


def mean_loss(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: SequenceSum) -> LossOutput:
    """What SFT minimises."""
    return LossOutput(-(outputs.log_probs * batch.loss_weights).sum(), {})


def measure_steps(backend: TrainBackend, config: dict[str, object], steps: int) -> list[str]:
    """A row of the table of training: utilisation of all GPUs, peak of this rank's."""
    batch = make_batch(int(str(config["vocab_size"])))
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 2):
        start = time.perf_counter()
        backend.train_step([batch], mean_loss, wants=Wants())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    lengths = np.array(batch.sequence_lengths)
    flops = training_flops(config, lengths, lengths - 1)
    assert flops is not None
    step_s = median(seconds[2:])
    peak = torch.cuda.max_memory_allocated() / 2**30
    share = flops / step_s / PEAK_FLOPS / backend.layout.world_size
    numbers = [f"{step_s:.3f}", f"{TOKENS / step_s:,.0f}", f"{share:.3f}", f"{peak:.0f}"]
    return [*numbers, f"{seconds[0]:.0f}"]


def measure_log_probs(backend: FSDPBackend) -> list[list[str]]:
    """Rows of the table of log-probs: time, and memory beyond hidden states, weights and their gradients."""
    from slime.backends.shared.target_log_probs import LogitRule, target_log_probs

    config = backend._policy("actor").lm.config
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(TOKENS, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, config.vocab_size, (TOKENS,), device="cuda")
    rows = []
    for chunk in (256, 512, 1024):
        rule = LogitRule(1.0, None, chunk)

        def forward(rule: LogitRule = rule) -> Tensor:
            with torch.no_grad():
                return target_log_probs(hidden, head, targets, rule, entropy=False)[0]

        def both(rule: LogitRule = rule) -> tuple[Tensor, ...]:
            total = target_log_probs(hidden, head, targets, rule, entropy=False)[0].sum()
            return torch.autograd.grad(total, (hidden, head.weight))

        gradients = (head.weight.numel() + hidden.numel()) * 2
        for name, call, known in (("forward", forward, 0), ("and backward", both, gradients)):
            rows.append([name, str(chunk), *time_and_peak(call, known)])
    return rows


def time_and_peak(call: Callable[[], object], known: int = 0) -> list[str]:
    """Milliseconds of a call, median of three after the first, and MB at its peak beyond `known` bytes of results.

    What the call returns is given up before the next.
    """
    milliseconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        milliseconds.append(1e3 * (time.perf_counter() - start))
        del result
    peak = torch.cuda.max_memory_allocated() - before - known
    return [f"{median(milliseconds[1:]):.1f}", f"{peak / 1e6:.0f}"]


def measure_sleep(backend: FSDPBackend | MegatronBackend) -> list[str]:
    """A row of the table of sleep; the first time, when the host's memory is page-locked, is not shown."""
    down, up = pinned_bytes_per_s()
    for _ in range(2):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        start = time.perf_counter()
        backend.sleep()
        asleep = time.perf_counter()
        left = torch.cuda.memory_allocated()
        moved = sum(len(host) for _, host in backend.host_copy._stored)
        woken = time.perf_counter()
        backend.wake_up()
        awake = time.perf_counter()
    seconds = asleep - start, awake - woken
    shares = [moved / took / speed for took, speed in zip(seconds, (down, up), strict=True)]
    times = [f"{moved / 2**30:.1f}", *(f"{took:.2f}" for took in seconds), f"{down / 1e9:.0f} / {up / 1e9:.0f}"]
    return [*times, " / ".join(f"{share:.2f}" for share in shares), f"{left / 2**30:.2f}"]


def pinned_bytes_per_s() -> tuple[float, float]:
    """Copies of one block from the GPU to page-locked memory, and back; median of five."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")

    def speed(target: Tensor, source: Tensor) -> float:
        seconds = []
        for _ in range(6):
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return COPY_BYTES / median(seconds[1:])

    return speed(host, there), speed(there, host)


if __name__ == "__main__":
    main()
