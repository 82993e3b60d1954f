"""What of a GRPO step takes time beyond its tokens: one micro-batch with one thing of such a step after another.

    python -m benchmarks.gpu.steps [--shape qwen3-0.6B] [--train-backend megatron] [--steps 5] [--flags ...]

14 answers of 1,024 tokens to prompts of 145, some 16,000 tokens; forward to optimizer step, median of `steps` after two
warm-ups, and where a step has several micro-batches seconds of one. graphs and compile s: torch.compile in the counted
steps; cudaMallocs: blocks asked of the GPU in them. In a trainer of a run OMP_NUM_THREADS is 1.
`benchmarks.gpu.grpo` shows the same counts of whole runs. Flags after --flags go to slime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.train import add_columns, mean_loss, open_trainer, settings
from scripts.random_checkpoint import SHAPES, write_checkpoint
from slime.data.batch import batch_from_samples
from slime.data.packed import PackedBatch, pack_rows
from slime.observability.counters import Counters
from slime.training.backend import TrainBackend, Wants
from slime.utils.distributed import init_process_group
from slime.utils.http_utils import find_free_port
from slime.utils.types import Sample

SAMPLES, GROUP, PROMPT_LEN, RESPONSE_LEN = 14, 8, 145, 1024
WARM_UP = 2


class Case(NamedTuple):
    """What a step has of GRPO's. varied: no two micro-batches have the same lengths. sleeps: before each step."""

    shared_prompts: bool = False
    entropy: bool = False
    varied: bool = False
    sleeps: bool = False
    num_micro_batches: int = 1


CASES = {
    "tokens alone": Case(),
    "shared prompts": Case(shared_prompts=True),
    "entropy": Case(entropy=True),
    "both": Case(shared_prompts=True, entropy=True),
    "both, lengths vary": Case(shared_prompts=True, entropy=True, varied=True),
    "both, after a night": Case(shared_prompts=True, entropy=True, sleeps=True),
    "all": Case(shared_prompts=True, entropy=True, varied=True, sleeps=True),
    "all, 8 micro-batches": Case(shared_prompts=True, entropy=True, varied=True, sleeps=True, num_micro_batches=8),
}


def main() -> None:
    """Measures every case and prints the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="qwen3-0.6B", choices=SHAPES)
    parser.add_argument("--train-backend", default="fsdp", choices=["fsdp", "megatron"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--steps", type=int, default=5, help="that count")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    init_process_group(backend="nccl", rank=0, world_size=1, address=f"127.0.0.1:{find_free_port()}", timeout_minutes=5)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(options.shape, Path(folder, "model"))
        measure(Path(folder, "model"), device, options)
    dist.destroy_process_group()


def measure(model: Path, device: torch.device, options: argparse.Namespace) -> None:
    """One backend for all cases."""
    backend = open_trainer(settings(model, options.train_backend, options.flags), device)
    backend.load()
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    table = Table(title=f"A micro-batch of a GRPO step, {options.shape} shape, {options.train_backend}")
    add_columns(table, "with", "tokens", "s/step", "all s", "tokens/s", "graphs", "compile s", "cudaMallocs", "retries")
    for name in options.cases:
        table.add_row(name, *row(backend, CASES[name], vocabulary, options.steps))
        Console(width=150).print(table)


def row(backend: TrainBackend, case: Case, vocabulary: int, steps: int) -> list[str]:
    """The columns of one case."""
    seconds, tokens, counters = [], [], Counters()
    totals: dict[str, float] = {}
    for step in range(WARM_UP + steps):
        if case.sleeps:
            backend.sleep()
            backend.wake_up()
        seeds = range(step * case.num_micro_batches, (step + 1) * case.num_micro_batches)
        batches = [make_batch(case, vocabulary, seed=seed if case.varied else 0) for seed in seeds]
        torch.cuda.synchronize()
        counters.collect()
        start = time.perf_counter()
        backend.train_step(batches, mean_loss, wants=Wants(entropy=case.entropy))
        torch.cuda.synchronize()
        if step >= WARM_UP:
            seconds.append((time.perf_counter() - start) / len(batches))
            tokens.append(sum(sum(batch.sequence_lengths) for batch in batches) / len(batches))
            totals = {key: totals.get(key, 0.0) + value for key, value in counters.collect().items()}
    middle = median(seconds)
    names = ("graphs", "compile_time", "cuda_mallocs", "cuda_malloc_retries")
    counts = [f"{totals.get(f'perf/train_{name}', 0.0):.4g}" for name in names]
    shown = " ".join(f"{value:.3f}" for value in seconds)
    return [f"{median(tokens):,.0f}", f"{middle:.3f}", shown, f"{sum(tokens) / sum(seconds):,.0f}", *counts]


def make_batch(case: Case, vocabulary: int, *, seed: int) -> PackedBatch:
    """Samples of random tokens, as many as fit a micro-batch."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(SAMPLES):
        if index % GROUP == 0 or not case.shared_prompts:
            length = PROMPT_LEN - (int(rng.integers(0, PROMPT_LEN // 2)) if case.varied else 0)
            prompt = rng.integers(0, vocabulary, length).tolist()
        tokens = prompt + rng.integers(0, vocabulary, RESPONSE_LEN).tolist()
        samples.append(Sample(group_index=index // GROUP, tokens=tokens, response_length=RESPONSE_LEN))
    batch = batch_from_samples(samples, [0.0] * len(samples))
    return pack_rows(batch, range(len(batch)), batch.loss_mask / batch.loss_mask.sum())


if __name__ == "__main__":
    main()
