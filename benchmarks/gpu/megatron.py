"""The Megatron backend beside FSDP2 on the same GPU: training, memory of log-probs, sleep, loading, sending weights.

    python -m benchmarks.gpu.megatron [--parts train memory sleep load sync] [--shapes qwen3-4B qwen3-0.6B]
        [--limit-s 1500] [--steps 5] [--flags ...]

Each line of a table is measured in a process of its own, with megatron-core alone: no Transformer Engine, no Apex. The
table is printed again after each line; what fails is named, and nothing starts after --limit-s seconds. Logs of the
processes lie in --logs. On two GPUs Megatron also runs as TP2. Flags after --flags go to slime.

train    as benchmarks.gpu.train: a micro-batch of 16,384 tokens in sequences of 2,048, forward to optimizer step
memory   log-probs of 16,384 tokens, each backend's own head: peak beyond hidden states, weights and their gradients
sleep    the second time, beside copies of page-locked memory in the same process
load     from a Hugging Face directory, beside reading its files; both from the page cache
sync     to an SGLang server, as benchmarks.gpu.weights: CUDA IPC on one GPU, NCCL where there are two
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import train, weights
from scripts.random_checkpoint import SHAPES
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.shared.target_log_probs import LogitRule, target_log_probs
from slime.training.backend import Wants
from slime.utils.distributed import init_process_group
from slime.utils.files import write_text_atomically
from slime.utils.http_utils import find_free_port
from slime.utils.processes import OwnedProcess

RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--use-distributed-optimizer"]
VARIANTS: dict[str, dict[str, list[str]]] = {
    "megatron": {
        "compiled": ["--torch-compile"],
        "compiled, recompute": ["--torch-compile", *RECOMPUTE],
        "plain": [],
        "recompute": RECOMPUTE,
        "TP2": [*TP2, "--actor-num-gpus-per-node", "2"],
    },
    "fsdp": {name: flags for name, flags in train.VARIANTS.items() if name != "plain"},
}
BRIEF = ("compiled", "plain")  # of the shapes after the first
PARTS = ("train", "memory", "sleep", "load", "sync")
NAMES = ("shape", "backend", "variant")
COLUMNS = {
    "train": (*NAMES, "s/step", "tokens/s", "MFU", "peak GiB", "first step s"),
    "memory": (*NAMES, "direction", "vocabulary", "ms", "peak MB beyond inputs"),
    "sleep": (*NAMES, *train.SLEEP),
    "load": (*NAMES, "GB", "start s", "weights s", "files s", "weights / files"),
    "sync": (*NAMES, *weights.COLUMNS),
}


class Job(NamedTuple):
    """What one process measures, or a world of them."""

    part: str
    shape: str
    backend: str
    variant: str

    @property
    def world_size(self) -> int:
        """Its GPUs, each with a process."""
        return 2 if self.variant == "TP2" else 1


def main() -> None:
    """Runs the jobs in turn and prints a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-4B", "qwen3-0.6B"], choices=SHAPES)
    parser.add_argument("--backends", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--variants", nargs="+", help="of the part train, and TP2 of load (default: all)")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=1500.0, help="for all together")
    parser.add_argument("--job-limit-s", type=float, default=240.0, help="for one line")
    parser.add_argument("--logs", type=Path, default=Path("runs/benchmark-megatron"))
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--place", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    if options.job:
        work(Job(*options.job), options)
        return
    deadline = time.monotonic() + options.limit_s
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            write_checkpoint_elsewhere(shape, Path(folder, shape), options.layers)
        for part in options.parts:
            table = Table(title=f"{part}, torch {torch.__version__}")
            train.add_columns(table, *COLUMNS[part])
            for job in jobs_of(part, options):
                for row in rows_of(job, Path(folder, job.shape), options, deadline):
                    table.add_row(*job[1:], *row)
                Console(width=170).print(table)


def write_checkpoint_elsewhere(shape: str, model: Path, num_layers: int | None) -> None:
    """In a process that gives the GPU's memory back when it ends. Raises CalledProcessError where it fails."""
    layers = [] if num_layers is None else ["--layers", str(num_layers)]
    command = [sys.executable, "scripts/random_checkpoint.py", shape, str(model), *layers]
    subprocess.run(command, check=True, timeout=300)


def jobs_of(part: str, options: argparse.Namespace) -> Iterator[Job]:
    """The lines of a table, the most wanted first."""
    for index, shape in enumerate(options.shapes if part in ("train", "memory") else options.shapes[:1]):
        for backend in options.backends:
            if part == "train":
                names = [name for name in VARIANTS[backend] if index == 0 or name in BRIEF]
            else:
                names = ["recompute", "TP2"] if (part, backend) == ("load", "megatron") else ["recompute"]
            yield from (Job(part, shape, backend, name) for name in names if name in (options.variants or names))


def rows_of(job: Job, model: Path, options: argparse.Namespace, deadline: float) -> list[list[str]]:
    """What a job's processes measured, or one line that says why there is nothing."""
    num_gpus = torch.cuda.device_count()
    if job.world_size > max(num_gpus, 1):
        return [[f"not run: {num_gpus} GPU"]]
    left_s = min(deadline - time.monotonic(), options.job_limit_s * (2 if job.part == "sync" else 1))
    if left_s < 0:
        return [["not run: the time is up"]]
    found = model.with_name("rows.json")
    found.unlink(missing_ok=True)
    log = options.logs / ("-".join(job).replace(" ", "").replace(",", "-") + ".log")
    log.unlink(missing_ok=True)
    address = f"127.0.0.1:{find_free_port()}"
    own = ["--job", *job, "--model", str(model), "--steps", str(options.steps), "--logs", str(options.logs)]
    command = [sys.executable, "-m", "benchmarks.gpu.megatron", *own]
    processes = [
        OwnedProcess([*command, "--place", str(rank), address, "--flags", *options.flags], log_path=log)
        for rank in range(job.world_size)
    ]
    try:
        return results(processes, found, time.monotonic() + left_s)
    finally:
        for process in processes:
            process.stop()


def results(processes: list[OwnedProcess], path: Path, deadline: float) -> list[list[str]]:
    """The rows that a job left at `path` before it ended."""
    while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
        if time.monotonic() > deadline:
            return [["ended: it took too long"]]
        time.sleep(0.5)
    if path.exists():
        rows: list[list[str]] = json.loads(path.read_text())
        return rows
    lines = processes[0].log_tail(200).splitlines()
    errors = [line for line in lines if "Error" in line] or lines or ["without a word"]
    return [["out of memory" if any("OutOfMemoryError" in line for line in errors) else f"failed: {errors[-1]}"]]


def work(job: Job, options: argparse.Namespace) -> None:
    """One process of a job; the first leaves its rows beside the model."""
    rank, address = int(options.place[0]), options.place[1]
    if job.backend == "megatron":
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # read when the GPU is opened
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    weights.use_nccl_as_sglang_does()
    init_process_group(backend="nccl", rank=rank, world_size=job.world_size, address=address, timeout_minutes=3)
    rows = measure(job, device, options)
    if rank == 0:
        write_text_atomically(options.model.with_name("rows.json"), json.dumps(rows))
    dist.destroy_process_group()


def measure(job: Job, device: torch.device, options: argparse.Namespace) -> list[list[str]]:
    """The rows of a job, after its name."""
    if job.part == "sync":
        return sent(job, device, options)
    flags = [*VARIANTS[job.backend][job.variant], *options.flags]
    backend: Any = train.open_trainer(train.settings(options.model, job.backend, flags), device)
    if job.part == "load":
        return [loaded(backend, options.model)]
    backend.load()
    config = json.loads((options.model / "config.json").read_text())
    if job.part == "memory":
        return log_prob_memory(backend, config)
    row = train.measure_steps(backend, config, options.steps if job.part == "train" else 1)
    return [row if job.part == "train" else train.measure_sleep(backend)]


def log_prob_memory(backend: Any, config: dict[str, Any]) -> list[list[str]]:
    """Rows of one backend, all of the vocabulary: without gradient, and with that of hidden states and head."""
    batch = train.make_batch(config["vocab_size"])
    dtype = torch.float32 if backend.device.type == "cpu" else torch.bfloat16
    shape = train.TOKENS, config["hidden_size"]
    hidden = torch.randn(shape, device=backend.device, dtype=dtype, requires_grad=True)
    call, weight = head_of(backend, batch, hidden)

    def forward() -> None:
        with torch.no_grad():
            call()

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(call().sum(), (hidden, weight))

    gradients = hidden.nbytes + weight.nbytes
    vocabulary = f"{config['vocab_size']:,}"
    rows = [("forward", forward, 0), ("and backward", both, gradients)]
    return [[name, vocabulary, *train.time_and_peak(known_call, known)] for name, known_call, known in rows]


def head_of(backend: Any, batch: Any, hidden: torch.Tensor) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """Log-probs of the response tokens from hidden states [n, E], as the backend computes them, and its head."""
    from slime.backends.megatron_utils.packing import inputs_of

    if not isinstance(backend, FSDPBackend):
        inputs, held = inputs_of(batch, backend.passes.split, backend.device), backend.chunk.weights()
        weight = held.get("output_layer.weight", held["embedding.word_embeddings.weight"])

        def of_megatron() -> torch.Tensor:
            backend.passes.head.wanted = (inputs, Wants())
            log_probs: torch.Tensor = backend.passes.head.forward(hidden[:, None], weight)[0]
            backend.passes.head.take()
            return log_probs

        return of_megatron, weight
    head = torch.nn.Linear(hidden.shape[1], backend._policy("actor").lm.config.vocab_size, bias=False)
    head = head.to(hidden.device, hidden.dtype)
    targets = batch.targets.to(hidden.device)
    rule = LogitRule(1.0, None, backend.run.log_probs_chunk_size)
    return lambda: target_log_probs(hidden[-len(targets) :], head, targets, rule, entropy=False)[0], head.weight


def loaded(backend: Any, model: Path) -> list[str]:
    """Seconds until a backend stands, optimizer included, and of the weights alone; beside those of the files."""
    files = sorted(model.glob("*.safetensors"))
    files_s = min(read_s(files) for _ in range(2))
    begin = time.perf_counter()
    backend.load()
    torch.cuda.synchronize()
    start_s = time.perf_counter() - begin
    weights_s = start_s
    if not isinstance(backend, FSDPBackend):  # once more, into the model that stands
        from slime.backends.megatron_utils.sources import Source

        dist.barrier()
        begin = time.perf_counter()
        backend._read(Source(model, is_checkpoint=False))
        torch.cuda.synchronize()
        dist.barrier()
        weights_s = time.perf_counter() - begin
    num_bytes = sum(path.stat().st_size for path in files)
    numbers = [f"{num_bytes / 1e9:.2f}", f"{start_s:.2f}", f"{weights_s:.2f}", f"{files_s:.2f}"]
    return [*numbers, f"{weights_s / files_s:.2f}"]


def read_s(files: list[Path]) -> float:
    """Seconds of reading files into one block of memory."""
    block = memoryview(bytearray(64 * 2**20))
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - begin


def sent(job: Job, device: torch.device, options: argparse.Namespace) -> list[list[str]]:
    """A row for each way in which weights can reach an engine here."""
    options.train_backend, options.updates, options.check = job.backend, 7, False
    kinds = list(weights.SLOTS)[: torch.cuda.device_count()]
    return [weights.measure_kind(options.model, kind, device, options) for kind in kinds]


if __name__ == "__main__":
    main()
