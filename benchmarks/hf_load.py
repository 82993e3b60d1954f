"""Loading a Hugging Face directory into a Megatron model of two tensor-parallel ranks, against reading its files.

    python -m benchmarks.hf_load [--rounds 3] [--hidden 2048 --layers 28]

On a CPU, over gloo: the model is Megatron's, its GPU calls are mapped to the CPU. Files hold random bfloat16 weights
of a Qwen3-1.7B shape unless told otherwise. The ways take turns, round by round, in the same two processes.

one reader: one process reads every file from end to end, in pieces of 16 MiB, and keeps nothing.
two readers: each rank reads half of the bytes of every file.
load: each rank fills its part of the model, as the backend does at its start.
cold: the kernel was told before each turn to forget the files (posix_fadvise). warm: they are in the page cache.
read, MiB: what the ranks asked of the files, both together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from slime.arguments import Args
from slime.backends.megatron_utils.names import HFDirectory, all_parameters, read_shape
from tests.helpers.megatron_cpu import megatron_on_cpu

PIECE = 16 << 20
FILE_BYTES = 1 << 30
STATES = ("cold", "warm")
WAYS = ("one reader", "two readers", "load")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=28)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_model(Path(folder), hidden=args.hidden, layers=args.layers)
        torch.multiprocessing.spawn(measure, (folder, args.rounds), nprocs=2)
        seconds, asked = json.loads((Path(folder) / "seconds.json").read_text())
    table = Table("", *WAYS, "load / one reader", "load / two readers", "read, MiB")
    table.title = f"{num_bytes / 2**30:.2f} GiB of bfloat16, two ranks, seconds (medians of {args.rounds})"
    for state in STATES:
        one, two, load = (statistics.median(seconds[f"{state} {way}"]) for way in WAYS)
        times = (f"{value:.2f}" for value in (one, two, load))
        table.add_row(state, *times, f"{load / one:.2f}", f"{load / two:.2f}", f"{asked / 2**20:,.0f}")
    Console(width=120).print(table)


def write_model(folder: Path, *, hidden: int, layers: int) -> int:
    """A directory of the shape, on the disk. Returns the bytes of its tensors."""
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": hidden}
    config |= {"intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 128}
    config |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}))
    held: dict[str, Tensor] = {}
    total = number = 0
    shapes = {name: shape for parameter in all_parameters(read_shape(folder)) for name, shape in parameter.hf}
    for name, shape in shapes.items():
        held[name] = torch.empty(shape, dtype=torch.int16).random_(0x3000, 0x3C00).view(torch.bfloat16)
        total += held[name].nbytes
        is_last = name == list(shapes)[-1]
        if is_last or sum(tensor.nbytes for tensor in held.values()) > FILE_BYTES:
            save_file(held, folder / f"model-{number:05d}.safetensors")
            held, number = {}, number + 1
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return total


def measure(rank: int, folder: str, rounds: int) -> None:
    """One of the two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    files = sorted(Path(folder).glob("*.safetensors"))
    asked: list[int] = []
    with megatron_on_cpu():
        load = loader(folder, asked)
        ways: dict[str, Callable[[], None]] = {
            "one reader": lambda: read_plainly(files, 0, 1) if rank == 0 else None,
            "two readers": lambda: read_plainly(files, rank, 2),
            "load": load,
        }
        seconds: dict[str, list[float]] = {f"{state} {way}": [] for state in STATES for way in WAYS}
        for _ in range(rounds):
            for state in STATES:
                for way in WAYS:
                    prepare(files, state)
                    seconds[f"{state} {way}"].append(timed(ways[way]))
    shares = [0, 0]
    dist.all_gather_object(shares, asked[-1])
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps([seconds, sum(shares)]))
    dist.barrier()


def prepare(files: list[Path], state: str) -> None:
    """Have all of the files in the page cache, or nothing of them."""
    if state == "warm":
        read_plainly(files, 0, 1)
    for path in files if state == "cold" else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(run: Callable[[], None]) -> float:
    """Seconds until both ranks are through."""
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start


def read_plainly(files: list[Path], part: int, num_parts: int) -> None:
    """The bytes of one part of every file."""
    buffer = memoryview(bytearray(PIECE))
    for path in files:
        size = path.stat().st_size
        left = size * (part + 1) // num_parts - size * part // num_parts
        with path.open("rb", buffering=0) as file:
            file.seek(size * part // num_parts)
            while left > 0:
                left -= file.readinto(buffer[: min(left, PIECE)]) or left


def loader(folder: str, asked: list[int]) -> Callable[[], None]:
    """What fills this rank's part, a new one each time. asked: the bytes that it asked of the files are added there."""
    from slime.backends.megatron_utils import transformer
    from slime.backends.megatron_utils.arguments import MegatronConfig
    from slime.backends.megatron_utils.model import build_chunk, read_weights
    from slime.backends.megatron_utils.parallel import open_groups

    cfg = MegatronConfig(tensor_model_parallel_size=2, megatron_args={"perform_initialization": False})
    run = Args(hf_checkpoint=folder)
    open_groups(cfg, run)
    shape, cpu = read_shape(folder), torch.device("cpu")
    config = transformer.transformer_config(
        shape, cfg, context_size=1, dtype=torch.bfloat16, device=cpu, transformer_engine=False
    )
    options = transformer.model_options(shape, cfg, is_critic=False)
    chunk = build_chunk(config, shape, options, transformer_engine=False, device=cpu)

    def load() -> None:
        files, total = HFDirectory(folder), 0

        def read(name: str, axis: int, start: int, stop: int) -> Tensor:
            nonlocal total
            part = files.read(name, axis, start, stop)
            total += part.nbytes
            return part

        read_weights(chunk, shape, read)
        asked.append(total)

    load()  # the model's memory is touched
    return load


if __name__ == "__main__":
    main()
