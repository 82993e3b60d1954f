"""What the rollout function costs beside its requests: `generate_rollout` against a bare asyncio client, same server.

Both post the same 10,000 requests, at most 512 at once, to a server that answers at once (`instant_engine.py`), in turn
and several times in one run. slime's side also reads prompts, tokenises, scores and fills Samples.

    python -m benchmarks.overhead [--samples 10000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from slime.arguments import Args, parse_args
from slime.cli.quickstart_data import make_tiny_model
from slime.rollout.data_source import RolloutDataSource
from slime.rollout.sglang_rollout import generate_rollout
from slime.utils.http_utils import HTTPError, close, find_free_port, get
from slime.utils.misc import rare_garbage_collection
from slime.utils.processes import OwnedProcess, raise_open_file_limit

CONCURRENCY = 512
GROUP = 8


@contextlib.contextmanager
def instant_engine(directory: Path) -> Iterator[int]:
    """The port of a running instant engine."""
    port = find_free_port()
    process = OwnedProcess(
        [sys.executable, "-m", "benchmarks.instant_engine", str(port)], log_path=directory / "engine.log"
    )
    try:
        asyncio.run(_wait_until_up(port))
        yield port
    finally:
        process.stop()


async def _wait_until_up(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(HTTPError):
            await get(f"http://127.0.0.1:{port}/health", timeout_s=1)
            await close()
            return
        await asyncio.sleep(0.05)
    raise TimeoutError("the instant engine did not come up within 30 s")


def make_args(directory: Path, port: int, num_samples: int) -> Args:
    """Settings of a rollout of `num_samples` against the instant engine."""
    model = make_tiny_model(directory / "model", 0)
    prompts = directory / "prompts.jsonl"
    rows = ({"input": f"{i}+{i}=", "label": str(2 * i)} for i in range(num_samples // GROUP))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "--train-backend": "fsdp",
        "--hf-checkpoint": str(model),
        "--prompt-data": str(prompts),
        "--label-key": "label",
        "--rm-type": "exact_match",
        "--rollout-batch-size": str(num_samples // GROUP),
        "--n-samples-per-prompt": str(GROUP),
        "--num-rollout": "1",
        "--actor-num-gpus-per-node": "1",
        "--rollout-num-gpus": "1",
        "--sglang-server-concurrency": str(CONCURRENCY),
        "--sglang-router-ip": "127.0.0.1",
        "--sglang-router-port": str(port),
    }
    return parse_args([part for item in flags.items() for part in item])


def run_slime(args: Args) -> None:
    """One rollout as the rollout manager runs it."""
    groups = generate_rollout(args, 0, RolloutDataSource(args)).samples
    assert sum(map(len, groups)) == (args.rollout_batch_size or 0) * GROUP
    assert all(sample.response_length == 8 for group in groups for sample in group)


async def run_bare(port: int, num_samples: int) -> None:
    """The same requests from a client that keeps nothing but the decoded answers."""
    payload = {
        "input_ids": list(range(16)),
        "sampling_params": {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 1024, "stop": None},
        "return_logprob": True,
    }
    semaphore = asyncio.Semaphore(CONCURRENCY)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def request(index: int) -> dict[str, Any]:
            body = orjson.dumps(payload | {"rid": str(index)})
            async with (
                semaphore,
                session.post(
                    f"http://127.0.0.1:{port}/generate", data=body, headers={"Content-Type": "application/json"}
                ) as answer,
            ):
                result: dict[str, Any] = orjson.loads(await answer.read())
                return result

        results = await asyncio.gather(*(request(index) for index in range(num_samples)))
    assert len(results) == num_samples


def seconds(function: Callable[[], None]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    raise_open_file_limit()
    with tempfile.TemporaryDirectory() as name, instant_engine(Path(name)) as port:
        args = make_args(Path(name), port, options.samples)
        run_slime(args)  # warm-up: imports, tokenizer, connections
        before = psutil.Process().memory_info().rss
        ours, bare = [], []
        for _ in range(options.rounds):
            with rare_garbage_collection():  # which generate_rollout does for itself
                bare.append(seconds(lambda: uvloop.run(run_bare(port, options.samples))))
            ours.append(seconds(lambda: run_slime(args)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print_table(options.samples, ours, bare, peak - before)


def print_table(num_samples: int, ours: list[float], bare: list[float], memory: int) -> None:
    """Requests/s of both, their ratio round by round, and memory."""
    table = Table(title=f"{num_samples:,} requests, {CONCURRENCY} at once, {os.cpu_count()} cores, {len(ours)} rounds")
    for heading in ("client", "requests/s (median)", "min", "max"):
        table.add_column(heading)
    for name, times in (("bare asyncio (aiohttp)", bare), ("slime generate_rollout", ours)):
        rates = sorted(num_samples / t for t in times)
        table.add_row(name, f"{statistics.median(rates):,.0f}", f"{rates[0]:,.0f}", f"{rates[-1]:,.0f}")
    ratio = statistics.median(b / o for o, b in zip(ours, bare, strict=True))
    table.add_row("slime / bare (median of rounds)", f"{ratio:.2f}", "", "")
    table.add_row("memory for the samples in flight", f"{memory / 2**20:,.0f} MiB", "", "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
