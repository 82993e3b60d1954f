"""The embedded engine over HTTP against `model.generate` on one padded batch: same model, prompts, threads, run.

    python -m benchmarks.engine_cpu [--threads 1 2] [--lengths long-tailed uniform] [--hidden 128] [--rounds 5]

Prints a table for each number of threads and mix of lengths: tokens/s, time to the first token, and peak memory of the
process that holds the model. Prompts have 16 to 512 tokens, from a fixed seed, and none shares a prefix with another:
`long-tailed` is log-normal around 96, as problems of GSM8K or MATH are; `uniform` wastes less of a padded batch.
Both sides sample at temperature 1 and return what a rollout needs: tokens, and for the engine their log-probabilities
as well. The sides run in turn, after a round each that does not count; the ratio is the median of the rounds' ratios.
`generate` answers nobody before the last token is drawn, so its time to the first token is the whole time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import multiprocessing
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import aiohttp
import orjson
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 120.0


def long_tailed(generator: random.Random, shortest: int, longest: int) -> int:
    """Log-normal around 96 tokens, two thirds between 50 and 184, cut to the bounds."""
    return min(longest, max(shortest, round(generator.lognormvariate(math.log(96), 0.65))))


def uniform(generator: random.Random, shortest: int, longest: int) -> int:
    """Any length within the bounds alike."""
    return generator.randint(shortest, longest)


LENGTHS: dict[str, Callable[[random.Random, int, int], int]] = {"long-tailed": long_tailed, "uniform": uniform}


@dataclass(frozen=True)
class Round:
    """One run over all prompts."""

    seconds: float
    num_tokens: int
    first_token_s: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second."""
        return self.num_tokens / self.seconds


def main() -> None:
    """Runs both sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, args.hidden, args.layers)
        for lengths, threads in itertools.product(args.lengths, args.threads):
            prompts = make_prompts(args.requests, args.shortest, args.longest, lengths)
            ours, theirs, memory = measure(folder, prompts, args.new_tokens, threads=threads, rounds=args.rounds)
            size = f"Qwen3 hidden {args.hidden}, {args.layers} layers, {threads} thread(s)"
            mean = sum(map(len, prompts)) / len(prompts)
            spread = f"{args.shortest}-{args.longest} tokens ({lengths}, mean {mean:.0f})"
            load = f"{len(prompts)} prompts of {spread}, {args.new_tokens} new"
            print_table(f"{size}; {load}", ours, theirs, memory)


def make_model(folder: str, hidden: int, layers: int) -> None:
    """A tiny Qwen3 with heads of 32, a quarter as many for keys and values: the proportions of Qwen3-4B."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers.tiny_models import make_tiny_model

    heads = hidden // 32
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "head_dim": 32}
    make_tiny_model(folder, "qwen3", **sizes, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4))


def make_prompts(count: int, shortest: int, longest: int, lengths: str) -> list[list[int]]:
    """Random prompts whose lengths are drawn as `LENGTHS[lengths]` does; one is the longest."""
    generator = random.Random(0)
    drawn = (LENGTHS[lengths](generator, shortest, longest) for _ in range(count - 1))
    return [[generator.randrange(4, 320) for _ in range(length)] for length in [longest, *drawn]]


def measure(
    folder: str, prompts: list[list[int]], new_tokens: int, *, threads: int, rounds: int
) -> tuple[list[Round], list[Round], dict[str, float]]:
    """Rounds of the engine and of generate in turn, after one each that does not count; peak memory of both in MB."""
    ours, theirs = [], []
    with (
        running_engine(folder, threads) as (url, pid),
        running_generate(folder, prompts, new_tokens, threads) as worker,
    ):
        for _ in range(rounds + 1):
            ours.append(asyncio.run(engine_round(url, prompts, new_tokens)))
            worker.send("run")
            theirs.append(worker.recv())
        worker.send("memory")
        memory = {"engine": peak_memory_mb(pid), "generate": worker.recv()}
    return ours[1:], theirs[1:], memory


@contextmanager
def running_engine(folder: str, threads: int) -> Iterator[tuple[str, int]]:
    """A started engine: its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "slime.engine.embedded.server", "--model-path", folder, "--port", str(port)]
    command += ["--num-threads", str(threads)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    process = subprocess.Popen([*command, "--log-level", "warning"], env=environment)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the engine did not come up")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()


async def engine_round(url: str, prompts: list[list[int]], new_tokens: int) -> Round:
    """All prompts as single requests at once."""
    sampling = {"max_new_tokens": new_tokens, "temperature": 1.0, "ignore_eos": True}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.post(f"{url}/flush_cache") as answer:
            answer.raise_for_status()

        async def generate(tokens: list[int]) -> dict[str, float]:
            body = orjson.dumps({"input_ids": tokens, "sampling_params": sampling, "return_logprob": True})
            async with session.post(f"{url}/generate", data=body) as answer:
                answer.raise_for_status()
                return orjson.loads(await answer.read())["meta_info"]

        start = time.perf_counter()
        infos = await asyncio.gather(*map(generate, prompts))
        seconds = time.perf_counter() - start
    first = median(info["time_to_first_token"] for info in infos)
    return Round(seconds, sum(int(info["completion_tokens"]) for info in infos), first)


@contextmanager
def running_generate(folder: str, prompts: list[list[int]], new_tokens: int, threads: int) -> Iterator[Connection]:
    """A process with the model in transformers that runs a round, or tells its memory, for each message."""
    ours, its = multiprocessing.get_context("spawn").Pipe()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    process = multiprocessing.get_context("spawn").Process(
        target=serve_generate, args=(its, folder, prompts, new_tokens, threads), daemon=True
    )
    process.start()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def serve_generate(
    connection: Connection, folder: str, prompts: list[list[int]], new_tokens: int, threads: int
) -> None:
    """Answers "run" with a Round of `model.generate` on one batch padded on the left, "memory" with the peak in MB."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[3] * (longest - len(tokens)) + tokens for tokens in prompts])
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts])
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    while True:
        if connection.recv() == "memory":
            connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            continue
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, **length)
        seconds = time.perf_counter() - start
        connection.send(Round(seconds, (output.shape[1] - longest) * len(prompts), seconds))


def peak_memory_mb(pid: int) -> float:
    """The largest resident size that a process had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def print_table(title: str, ours: list[Round], theirs: list[Round], memory: dict[str, float]) -> None:
    """The median round of each side, and the ratio of their speeds."""
    table = Table("", "tokens/s", "seconds", "median first token, s", "peak memory, MB", title=title)
    for key, name, rounds in (
        ("engine", "embedded engine over HTTP", ours),
        ("generate", "model.generate, one batch", theirs),
    ):
        speed, seconds = median(r.tokens_per_s for r in rounds), median(r.seconds for r in rounds)
        first = median(r.first_token_s for r in rounds)
        table.add_row(name, f"{speed:.0f}", f"{seconds:.2f}", f"{first:.2f}", f"{memory[key]:.0f}")
    console = Console(width=120)
    console.print(table)
    ratios = sorted(one.tokens_per_s / other.tokens_per_s for one, other in zip(ours, theirs, strict=True))
    console.print(
        f"the engine generates {median(ratios):.1f} times as many tokens a second "
        f"(rounds: {', '.join(f'{ratio:.1f}' for ratio in ratios)})"
    )


if __name__ == "__main__":
    main()
