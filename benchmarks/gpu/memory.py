"""The memory estimate of `slime train --dry-run` against what one GPU measures: peaks of training, and memory asleep.

    python -m benchmarks.gpu.memory [--shapes qwen3-0.6B qwen3-4B] [--variants ...] [--micro-batches 1 2]

Micro-batches of 16,384 tokens in sequences of 2,048, as benchmarks.gpu.train has them; the peak of the second optimizer
step, when Adam's moments are there. A variant whose estimate is more than the GPU has is left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.train import VARIANTS, add_columns, make_backend, make_batch, mean_loss
from scripts.random_checkpoint import SHAPES, write_checkpoint
from slime.arguments import Args
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.cli.dry_run import count, empty_model, training_load
from slime.cli.memory_estimate import ModelSize, asleep_bytes, training_peak
from slime.training.backend import Wants
from slime.utils.distributed import init_process_group
from slime.utils.http_utils import find_free_port

GIB = 2**30


def main() -> None:
    """Runs all shapes and variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6B", "qwen3-4B"], choices=SHAPES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    init_process_group(backend="nccl", rank=0, world_size=1, address=f"127.0.0.1:{find_free_port()}", timeout_minutes=5)
    table = Table(title="GiB of one GPU, 16k tokens a micro-batch: estimated and measured")
    add_columns(table, "shape", "variant", "micro-batches", "estimate", "measured", "ratio", "reserved")
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(shape, Path(folder, "model"))
            for variant in options.variants:
                for row in measure_variant(Path(folder, "model"), device, VARIANTS[variant], options.micro_batches):
                    table.add_row(shape, variant, *row)
    dist.destroy_process_group()
    Console(width=120).print(table)


def measure_variant(model: Path, device: torch.device, flags: list[str], micro_batches: list[int]) -> list[list[str]]:
    """Rows of one variant: its peaks, and what is on the host while it sleeps."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    backend = make_backend(model, device, flags)
    assert isinstance(backend.run, Args)
    config = json.loads((model / "config.json").read_text())
    size = ModelSize.from_config(config, count(empty_model(str(model))))
    load = training_load(backend.run)
    rows = []
    for number in sorted(micro_batches):
        estimate = sum(training_peak(size, replace(load, accumulates=number > 1)).values())
        if estimate > torch.cuda.mem_get_info(device)[1]:
            rows.append([str(number), f"{estimate / GIB:.1f}", "does not fit"])
            continue
        rows.append(row_of(str(number), estimate, peak_of_step(backend, number)))
    if backend.optimizer.state:
        backend.sleep()
        rows.append(row_of("asleep, on the host", asleep_bytes(size, load), len(backend.host_copy._buffer))[:-1])
    return rows


def peak_of_step(backend: FSDPBackend, num_micro_batches: int) -> int:
    """Bytes allocated at the most in the second of two steps."""
    vocabulary = int(backend._policy("actor").lm.config.vocab_size)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        backend.train_step([make_batch(vocabulary)] * num_micro_batches, mean_loss, wants=Wants())
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def row_of(what: str, estimate: int, measured: int) -> list[str]:
    """Cells of a row of the table."""
    numbers = [f"{estimate / GIB:.1f}", f"{measured / GIB:.1f}", f"{estimate / measured:.3f}"]
    return [what, *numbers, f"{torch.cuda.max_memory_reserved() / GIB:.1f}"]


if __name__ == "__main__":
    main()
