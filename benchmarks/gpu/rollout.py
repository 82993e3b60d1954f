"""Rollout through slime against a bare asyncio load generator: the same SGLang server, the same requests, in turn.

    python -m benchmarks.gpu.rollout [--shape qwen3-0.6B] [--samples 256 1024] [--rounds 2] [--flags ...]

Prompts of 100 to 200 tokens, 8 answers each of 1,024 tokens, all of a round at once. The prefix cache is emptied before
each turn. A rate is output tokens over wall time; the ratio is the median of the rounds'. Flags after --flags go to
slime as they are, those for SGLang (--sglang-X) among them.

bare: aiohttp and orjson in uvloop; posts the requests and keeps nothing but the decoded answers.
slime: `generate_rollout` as the rollout manager calls it: draws prompts, tokenises, posts, scores, fills Samples.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import aiohttp
import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.grpo import write_prompts
from scripts.random_checkpoint import SHAPES, write_checkpoint
from slime.arguments import Args, parse_args
from slime.backends.sglang_utils.command import sglang_commands
from slime.engine.spec import HOST, PORT, EngineSpec
from slime.ray.process_host import HIGHEST_PORT
from slime.rollout.data_source import RolloutDataSource
from slime.rollout.sglang_rollout import encode_prompt, generate_rollout
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.async_utils import run
from slime.utils.http_utils import HTTPError, find_free_port, get, post
from slime.utils.processes import OwnedProcess, raise_open_file_limit

GROUP = 8
RESPONSE_LEN = 1024
START_S = 300


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="qwen3-0.6B", choices=SHAPES)
    parser.add_argument("--samples", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--response-len", type=int, default=RESPONSE_LEN)
    parser.add_argument("--log", type=Path, default=Path("runs/benchmark-rollout/engine.log"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    raise_open_file_limit()
    table = Table(title=f"Rollout of {options.response_len} tokens a sample, {options.shape} shape, one GPU")
    for name in ("samples", "bare tokens/s", "slime tokens/s", "slime / bare", "rounds"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(options.shape, Path(folder, "model"))
        write_prompts(Path(folder, "prompts.jsonl"))
        port = find_free_port("127.0.0.1", highest=HIGHEST_PORT)
        flags = ["--rollout-max-response-len", str(options.response_len), *options.flags]
        with engine(make_args(Path(folder), port, GROUP, flags), port, options.log):
            measure(make_args(Path(folder), port, 64, flags), 1)  # imports, kernels
            for num_samples in options.samples:
                rates = measure(make_args(Path(folder), port, num_samples, flags), options.rounds)
                ratios = [ours / bare for bare, ours in rates]
                bare, ours = (median(side) for side in zip(*rates, strict=True))
                shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
                table.add_row(f"{num_samples:,}", f"{bare:,.0f}", f"{ours:,.0f}", f"{median(ratios):.3f}", shown)
                Console(width=100).print(table)


def make_args(folder: Path, port: int, num_samples: int, flags: list[str]) -> Args:
    """Settings of a rollout of `num_samples` against what listens on `port`."""
    return parse_args(
        f"--train-backend fsdp --hf-checkpoint {folder / 'model'} --prompt-data {folder / 'prompts.jsonl'} "
        f"--input-key prompt --rm-type random --rollout-engine sglang --num-rollout 1 --actor-num-gpus-per-node 1 "
        f"--rollout-num-gpus 1 --rollout-num-gpus-per-engine 1 --apply-chat-template --rollout-batch-size "
        f"{num_samples // GROUP} --n-samples-per-prompt {GROUP} --sglang-server-concurrency {max(num_samples, 64)} "
        f"--sglang-router-ip 127.0.0.1 --sglang-router-port {port}".split()
        + flags
    )


@contextlib.contextmanager
def engine(args: Args, port: int, log: Path, *, gpu: str | None = None) -> Iterator[None]:
    """SGLang as slime starts it, listening on `port`, on the only GPU it sees. Raises RuntimeError with its log's end.

    gpu: as CUDA_VISIBLE_DEVICES names it, the first if None.
    """
    spec = EngineSpec(
        index=0, model_path=args.hf_checkpoint, weight_version="0", num_threads=4, device="cuda", num_slots=1
    )
    (command,) = sglang_commands(args, spec)
    places = {HOST: "127.0.0.1", PORT: str(port)}
    place = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    process = OwnedProcess(
        [places.get(part, part) for part in command.argv], log_path=log, env={**os.environ, **command.env, **place}
    )
    try:
        deadline = time.monotonic() + START_S
        while not run(_is_up(f"http://127.0.0.1:{port}/health")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SGLang did not come up:\n{process.log_tail()}")
            time.sleep(1)
        yield
    finally:
        process.stop()


async def _is_up(url: str) -> bool:
    try:
        await get(url, timeout_s=2)
    except HTTPError:
        return False
    return True


def measure(args: Args, rounds: int) -> list[tuple[float, float]]:
    """Output tokens/s of the bare client and of slime, for each round; they take turns in being first."""
    source = RolloutDataSource(args)
    rates = []
    for number in range(rounds):
        groups = RolloutDataSource(args).get_samples(args.rollout_batch_size)
        prompts = [encode_prompt(tokenizer_of(args), sample) for group in groups for sample in group]
        turns = {"bare": partial(_bare, args, prompts), "slime": partial(_slime, args, source)}
        rate = {name: _rate(args, turns[name]) for name in sorted(turns, reverse=number % 2 == 1)}
        rates.append((rate["bare"], rate["slime"]))
    return rates


def _rate(args: Args, turn: Callable[[], int]) -> float:
    run(post(f"http://127.0.0.1:{args.sglang_router_port}/flush_cache", {}))
    start = time.perf_counter()
    num_tokens = turn()
    return num_tokens / (time.perf_counter() - start)


def _slime(args: Args, source: RolloutDataSource) -> int:
    groups = generate_rollout(args, 0, source).samples
    return sum(sample.response_length for group in groups for sample in group)


def _bare(args: Args, prompts: list[list[int]]) -> int:
    return uvloop.run(_post_all(args, prompts))


async def _post_all(args: Args, prompts: list[list[int]]) -> int:
    url = f"http://127.0.0.1:{args.sglang_router_port}/generate"
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": args.rollout_max_response_len}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def request(prompt: list[int]) -> int:
            body = orjson.dumps({"input_ids": prompt, "sampling_params": params, "return_logprob": True})
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
                output = orjson.loads(await answer.read())
            return len(output["meta_info"]["output_token_logprobs"])

        return sum(await asyncio.gather(*(request(prompt) for prompt in prompts)))


if __name__ == "__main__":
    main()
