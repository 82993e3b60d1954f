"""What the rollout function costs beside its requests: `generate_rollout` against a bare asyncio client, same servers.

    python -m benchmarks.overhead [--samples 10000] [--rounds 3]

The servers answer at once (`instant_engine.py`). The clients of a table take turns in one process, round by round; a
ratio is the median of the rounds'. Each side's rate is requests answered, by the server's count, over wall time; CPU is
that of the client's process.

bare: aiohttp and orjson in uvloop; posts the same requests, as many at once, and keeps nothing but the decoded answers.
slime: `generate_rollout` as the rollout manager calls it: draws prompts, tokenises, posts, scores (exact_match), fills
    Samples with tokens, log-probs, weight version and counters.
all features: in addition a buffered data source with --buffer-filter-path, --over-sampling-batch-size 1.25 times the
    rollout, dynamic sampling by check_reward_nonzero_std (drops a tenth of the groups), --partial-rollout with
    --mask-offpolicy-in-partial-rollout (the rest of each rollout is ended, buffered and goes on in the next), a custom
    generate function, an async custom reward (a dict, --reward-key) under its deadline, and the hooks for samples, for
    kept groups and for all groups. The plug-ins are those of `overhead_plugins.py`.
reward in workers: all features, the reward synchronous and so in worker processes. Those take CPU of the same machine.

One engine: 512 requests at once; slime keeps its connections from one rollout to the next, as in a run, the bare client
opens them. 64 engines: one server process listens on 64 addresses, so that servers cost both sides the same; 10,000
requests at once, each on a connection of its own, which both sides open in each round. Direct, sample i goes to engine
i mod 64; behind the router, both sides post to one sglang-router, started as slime starts it.

Peak memory: the most that the process held in any round over what it held before the first, the results of one rollout
included. With 64 engines as many requests are in flight as there are samples.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.overhead_plugins import NUM_ENGINES
from slime.arguments import Args, parse_args
from slime.cli.quickstart_data import make_tiny_model
from slime.ray.engine_command import router_command
from slime.rollout.sglang_rollout import generate_rollout
from slime.rollout.state import rare_collection
from slime.utils.async_utils import run
from slime.utils.http_utils import HTTPError, close, find_free_port, get, post
from slime.utils.misc import load_function
from slime.utils.processes import OwnedProcess, raise_open_file_limit

GROUP = 8
PLUGINS = "benchmarks.overhead_plugins"
FEATURES = {
    "--data-source-path": "slime.rollout.data_source.RolloutDataSourceWithBuffer",
    "--buffer-filter-path": f"{PLUGINS}.take_first",
    "--dynamic-sampling-filter-path": "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
    "--custom-generate-function-path": f"{PLUGINS}.generate_with_note",
    "--custom-rm-path": f"{PLUGINS}.reward_here",
    "--reward-key": "score",
    "--rollout-sample-hook-path": f"{PLUGINS}.hook",
    "--rollout-sample-filter-path": f"{PLUGINS}.remove_every_eighth",
    "--rollout-all-samples-process-path": f"{PLUGINS}.count_all",
    "--partial-rollout": "true",
    "--mask-offpolicy-in-partial-rollout": "true",
}
DIRECT = {"--custom-generate-function-path": f"{PLUGINS}.generate_at_engine_of_sample"}


class Question(NamedTuple):
    """A table. clients: the flags of each of slime's, by name."""

    title: str
    num_engines: int
    concurrency: int
    through_router: bool
    clients: dict[str, dict[str, str]]


QUESTIONS = (
    Question(
        "one engine",
        1,
        512,
        False,
        {
            "slime": {},
            "slime, all features": FEATURES,
            "slime, reward in workers": FEATURES | {"--custom-rm-path": f"{PLUGINS}.reward_in_worker"},
        },
    ),
    Question(f"{NUM_ENGINES} engines", NUM_ENGINES, 10_000, False, {"slime": DIRECT}),
    Question(f"{NUM_ENGINES} engines behind sglang-router", NUM_ENGINES, 10_000, True, {"slime": {}}),
)


@dataclass
class Measured:
    """Of one client: requests/s and CPU seconds per request of each round, and the most memory of any."""

    rates: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0


@contextlib.contextmanager
def instant_engines(directory: Path, num_engines: int) -> Iterator[int]:
    """The port of a running instant engine, at 127.0.0.1 to 127.0.0.num_engines."""
    port = find_free_port()
    command = [sys.executable, "-m", "benchmarks.instant_engine", str(port), str(num_engines)]
    process = OwnedProcess(command, log_path=directory / "engine.log")
    try:
        run(_until_up(f"http://127.0.0.1:{port}/health"))
        yield port
    finally:
        process.stop()


@contextlib.contextmanager
def router(directory: Path, args: Args, engine_port: int, num_engines: int) -> Iterator[int]:
    """The port of a router in front of the engines."""
    port = find_free_port()
    command = router_command(args, host="127.0.0.1", port=port, metrics_port=find_free_port())
    process = OwnedProcess(command, log_path=directory / "router.log")
    try:
        run(_until_up(f"http://127.0.0.1:{port}/health"))
        engines = [f"http://127.0.0.{number + 1}:{engine_port}" for number in range(num_engines)]
        run(_register(f"http://127.0.0.1:{port}", engines))
        yield port
    finally:
        process.stop()


async def _register(router_url: str, engine_urls: list[str]) -> None:
    for url in engine_urls:
        await post(f"{router_url}/workers", {"url": url})
    deadline = time.monotonic() + 30
    while sum(worker["is_healthy"] for worker in (await get(f"{router_url}/workers"))["workers"]) < len(engine_urls):
        assert time.monotonic() < deadline, "the router did not take the engines within 30 s"
        await asyncio.sleep(0.1)


async def _until_up(url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(HTTPError):
            await get(url, timeout_s=1)
            return
        await asyncio.sleep(0.05)
    raise TimeoutError(f"{url} did not answer within 30 s")


def make_args(directory: Path, port: int, num_samples: int, question: Question, flags: dict[str, str]) -> Args:
    """Settings of a rollout of `num_samples` against what listens on `port`."""
    rows = ({"input": f"{i}+{i}=", "label": str(2 * i)} for i in range(num_samples // GROUP))
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "--train-backend": "fsdp",
        "--hf-checkpoint": str(directory / "model"),
        "--prompt-data": str(prompts),
        "--label-key": "label",
        "--rm-type": "exact_match",
        "--rollout-batch-size": str(num_samples // GROUP),
        "--over-sampling-batch-size": str(num_samples // GROUP * (5 if flags.get("--partial-rollout") else 4) // 4),
        "--n-samples-per-prompt": str(GROUP),
        "--num-rollout": "1",
        "--actor-num-gpus-per-node": "1",
        "--rollout-num-gpus": str(question.num_engines),
        "--rollout-num-gpus-per-engine": "1",
        "--sglang-server-concurrency": str(-(-question.concurrency // question.num_engines)),
        "--sglang-router-ip": "127.0.0.1",
        "--sglang-router-port": str(port),
    }
    return parse_args([part for item in (common | flags).items() for part in item if part != "true"])


def slime_client(args: Args, *, keeps_connections: bool) -> Callable[[], None]:
    """A function that does one rollout after another, as the rollout manager does."""
    data_source = load_function(args.data_source_path)(args)
    rollout_ids = iter(range(10**9))

    def rollout() -> None:
        groups = generate_rollout(args, next(rollout_ids), data_source).samples
        assert len(groups) == args.rollout_batch_size
        assert all(sample.response_length == 8 for group in groups for sample in group)
        if not keeps_connections:
            run(close())

    return rollout


def bare_client(args: Args, urls: list[str], num_samples: int, concurrency: int) -> Callable[[], None]:
    """A function that does as many requests as a rollout of slime without features."""

    def requests() -> None:
        with rare_collection(args):  # which generate_rollout does for itself
            uvloop.run(_run_bare(urls, num_samples, concurrency))

    return requests


async def _run_bare(urls: list[str], num_samples: int, concurrency: int) -> None:
    payload = {
        "input_ids": list(range(16)),
        "sampling_params": {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 1024, "stop": None},
        "return_logprob": True,
    }
    semaphore = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def request(index: int) -> dict[str, Any]:
            body, headers = orjson.dumps(payload | {"rid": str(index)}), {"Content-Type": "application/json"}
            async with semaphore, session.post(urls[index % len(urls)], data=body, headers=headers) as answer:
                result: dict[str, Any] = orjson.loads(await answer.read())
                return result

        results = await asyncio.gather(*(request(index) for index in range(num_samples)))
    assert all("meta_info" in result for result in results)


def measure(question: Question, num_samples: int, rounds: int) -> dict[str, Measured]:
    """Every client of a table, the bare one first."""
    raise_open_file_limit()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_tiny_model(directory / "model", 0)
        engine_port = port = stack.enter_context(instant_engines(directory, question.num_engines))
        if question.through_router:
            args = make_args(directory, port, num_samples, question, {})
            port = stack.enter_context(router(directory, args, engine_port, question.num_engines))
        num_addresses = 1 if question.through_router else question.num_engines
        urls = [f"http://127.0.0.{number + 1}:{port}/generate" for number in range(num_addresses)]
        few = make_args(directory, port, GROUP, question, {})
        slime_client(few, keeps_connections=True)()  # imports, tokenizer
        clients = {"bare asyncio (aiohttp)": bare_client(few, urls, num_samples, question.concurrency)}
        for name, flags in question.clients.items():
            args = make_args(directory, port, num_samples, question, flags)
            clients[name] = slime_client(args, keeps_connections=question.num_engines == 1)
        return _alternate(clients, f"http://127.0.0.1:{engine_port}/count", rounds)


def _alternate(clients: dict[str, Callable[[], None]], count_url: str, rounds: int) -> dict[str, Measured]:
    """A first round shows memory and starts workers; the others are timed."""
    measured = {name: Measured() for name in clients}
    before = psutil.Process().memory_info().rss
    for number in range(rounds + 1):
        for name, client in clients.items():
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
            count, cpu_s, start = run(get(count_url)), time.process_time(), time.perf_counter()
            client()
            seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_s
            count = run(get(count_url)) - count
            measured[name].peak_bytes = max(measured[name].peak_bytes, _peak_bytes() - before)
            if number > 0:
                measured[name].rates.append(count / seconds)
                measured[name].cpu_s.append(cpu_s / count)
    return measured


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def print_table(question: Question, measured: dict[str, Measured], num_samples: int) -> None:
    """Requests/s of each, their ratio to the bare client's round by round, CPU and memory."""
    at_once = min(num_samples, question.concurrency)
    table = Table(title=f"{question.title}: {num_samples:,} requests, {at_once:,} at once, {os.cpu_count()} cores")
    for heading in ("client", "requests/s", "min", "max", "of bare", "CPU/request", "peak memory", "per request"):
        table.add_column(heading, justify="left" if heading == "client" else "right")
    bare, *_ = measured.values()
    for name, client in measured.items():
        rates = sorted(client.rates)
        ratio = statistics.median(rate / other for rate, other in zip(client.rates, bare.rates, strict=True))
        table.add_row(
            name,
            *(f"{rate:,.0f}" for rate in (statistics.median(rates), rates[0], rates[-1])),
            f"{ratio:.2f}",
            f"{statistics.median(client.cpu_s) * 1e6:.0f} µs",
            f"{client.peak_bytes / 2**20:,.0f} MiB",
            f"{client.peak_bytes / 2**10 / num_samples:,.1f} KiB",
        )
    Console(width=118).print(table)


def main() -> None:
    """Measure and print a table for each question, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for question in QUESTIONS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            measured = process.submit(measure, question, options.samples, options.rounds).result()
        print_table(question, measured, options.samples)


if __name__ == "__main__":
    main()
