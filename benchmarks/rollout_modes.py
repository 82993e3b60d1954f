"""Synchronous, partial, one rollout ahead, fully asynchronous: whole runs on one long-tailed mix of response lengths.

    python -m benchmarks.rollout_modes [--rollouts 8] [--rounds 3] [--step-ms 25] [--modes ...]

Each run is `slime train` or `train_async.py` with one trainer and one embedded engine, a thread each, behind a router.
The length of a response is a function of the sample's index alone, log-normal with a median of 24 tokens cut at 256, so
the modes have the same work (partial rollouts train on short responses first). The model is tiny, and waiting stands
for the time of devices, so that a busy machine may be used: a forward pass of the engine takes --step-ms at least,
whatever runs in it, as decoding is bound by memory and not by the batch; the trainer waits 2 ms for each token that it
trains on. Modes run in turn; the table shows medians of the rounds.

samples/s: all samples over the time from the first request to the end of the last step, filling the pipeline included.
engine idle: share of that time in which no request ran or waited, from looks at the engine 50 times a second.
staleness: versions between the policy that is trained and the weights that sampled, mean and maximum of the samples.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from slime.observability.report.run import finite, read_run
from slime.observability.report.staleness import staleness_counts
from slime.rollout.sglang_rollout import generate
from slime.utils.http_utils import HTTPError, close, find_free_port, get
from slime.utils.types import Sample
from tests.helpers.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, GROUP = 8, 4
MEDIAN, SPREAD, LONGEST = 24, 1.2, 256
LOOK_S = 0.02
TRAIN_TOKEN_S = 0.002
RUN_TIMEOUT_S = 1800.0


class Mode(NamedTuple):
    """script: what is started. flags: what it gets beyond the common ones."""

    script: str
    flags: tuple[str, ...] = ()


FULLY_ASYNC = "slime.rollout.fully_async_rollout.generate_rollout_fully_async"
MODES = {
    "sync": Mode("train.py"),
    "partial": Mode("train.py", ("--partial-rollout", "--over-sampling-batch-size", str(2 * PROMPTS))),
    "one-step-async": Mode("train_async.py"),
    "fully-async": Mode("train.py", ("--rollout-function-path", FULLY_ASYNC, "--max-weight-staleness", "2")),
}


class Round(NamedTuple):
    """What one run achieved. staleness: the ages of its samples, mean and maximum."""

    samples_per_s: float
    idle_share: float
    mean_staleness: float
    max_staleness: int


def response_length(index: int) -> int:
    """Tokens of the response of sample `index`."""
    drawn = random.Random(index).lognormvariate(math.log(MEDIAN), SPREAD)
    return min(LONGEST, max(4, round(drawn)))


async def long_tailed(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """The generation function of all runs: the default one, with a length given."""
    fixed = {"max_new_tokens": response_length(sample.index or 0), "ignore_eos": True}
    return await generate(args, sample, sampling_params | fixed)


def train_on_a_device(cfg: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """The trainer's wait, as --rollout-data-postprocess-path."""
    time.sleep(TRAIN_TOKEN_S * sum(len(mask) for mask in rollout_data["loss_masks"]))


@dataclass
class Looks:
    """Looks at the engine behind a router, in a thread: when, and how many requests ran or waited."""

    router: str
    seen: list[tuple[float, int]] = field(default_factory=list)

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Look for as long as the block runs."""
        stop = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._look_until(stop)), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    async def _look_until(self, stop: threading.Event) -> None:
        engine = None
        while not stop.is_set():
            with contextlib.suppress(HTTPError):
                if engine is None:
                    workers = (await get(f"{self.router}/workers", timeout_s=5))["workers"]
                    engine = workers[0]["url"] if workers else None
                else:
                    text = await get(f"{engine}/metrics", timeout_s=5)
                    self.seen.append(
                        (time.time(), sum(map(int, re.findall(r"num_(?:running|queue)_reqs (\d+)", text))))
                    )
            await asyncio.sleep(LOOK_S)
        await close()

    def idle_share(self, start: float, end: float) -> float:
        """The share of looks between two unix times that found nothing to do."""
        inside = [count for at, count in self.seen if start <= at <= end]
        return sum(count == 0 for count in inside) / max(1, len(inside))


def common_flags(model: Path, prompts: Path, options: argparse.Namespace) -> list[str]:
    """The settings of every run."""
    settings = {
        "--train-backend": "fsdp",
        "--device": "cpu",
        "--hf-checkpoint": str(model),
        "--prompt-data": str(prompts),
        "--label-key": "label",
        "--rm-type": "random",
        "--custom-generate-function-path": "benchmarks.rollout_modes.long_tailed",
        "--rollout-data-postprocess-path": "benchmarks.rollout_modes.train_on_a_device",
        "--rollout-batch-size": str(PROMPTS),
        "--n-samples-per-prompt": str(GROUP),
        "--num-rollout": str(options.rollouts),
        "--rollout-max-response-len": str(LONGEST),
        "--actor-num-gpus-per-node": "1",
        "--rollout-num-gpus": "1",
        "--num-threads": "1",
        "--max-tokens-per-gpu": "2048",
        "--lr": "1e-6",
        "--sglang-min-step-ms": str(options.step_ms),
        "--log-level": "warning",
    }
    return [part for item in settings.items() for part in item] + ["--use-dynamic-batch-size"]


@contextlib.contextmanager
def running_router() -> Iterator[int]:
    """The port of a router of our own, so that the engine can be found."""
    port = find_free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(find_free_port()), "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asyncio.run(_wait_for(f"http://127.0.0.1:{port}/health"))
        yield port
    finally:
        process.kill()
        process.wait()


async def _wait_for(url: str) -> None:
    await get(url, timeout_s=5, retry_for_s=60)
    await close()


def run_once(mode: Mode, flags: list[str], run_dir: Path) -> Round:
    """One run. Raises RuntimeError with the end of its output where it fails."""
    with running_router() as port:
        looks = Looks(f"http://127.0.0.1:{port}")
        router = ["--sglang-router-ip", "127.0.0.1", "--sglang-router-port", str(port)]
        command = [sys.executable, mode.script, *flags, *mode.flags, *router, "--run-dir", str(run_dir)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with looks.going_on():
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S
            )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return measured(run_dir, looks)


def measured(run_dir: Path, looks: Looks) -> Round:
    """What the files of a run and the looks at its engine tell."""
    run = read_run(run_dir)
    start = min(record.start for record in run.phases if record.phase in ("rollout", "rollout_wait"))
    end = run.series("rollout/step", "perf/step_time").times[-1]
    ages = staleness_counts(run)
    num_samples = sum(ages.values())
    return Round(
        num_samples / (end - start),
        looks.idle_share(start, end),
        sum(age * count for age, count in ages.items()) / num_samples,
        int(max(finite(run.series("rollout/step", "rollout/staleness/max").values))),
    )


def main() -> None:
    """Runs all modes in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=25.0, help="shortest forward pass of the engine")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args()
    rounds: dict[str, list[Round]] = {name: [] for name in options.modes}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model")
        flags = common_flags(model, make_prompts(Path(folder), options.rollouts), options)
        for number in range(options.rounds):
            for name in options.modes:
                rounds[name].append(run_once(MODES[name], flags, Path(folder) / f"{name}_{number}"))
                print(f"round {number}: {name} {rounds[name][-1].samples_per_s:.2f} samples/s", file=sys.stderr)
    print_table(rounds, options)


def make_prompts(folder: Path, num_rollouts: int) -> Path:
    """As many prompts as are used."""
    path = folder / "prompts.jsonl"
    rows = ({"input": f"{n}+{n}=", "label": str(2 * n)} for n in range(PROMPTS * num_rollouts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def print_table(rounds: dict[str, list[Round]], options: argparse.Namespace) -> None:
    """Medians of the rounds, and each round's throughput over the first mode's."""
    lengths = sorted(response_length(index) for index in range(PROMPTS * GROUP * options.rollouts))
    tail = f"median {lengths[len(lengths) // 2]}, mean {sum(lengths) / len(lengths):.0f}, longest {lengths[-1]}"
    size = f"{options.rollouts} rollouts of {PROMPTS} x {GROUP} samples ({tail} tokens)"
    table = Table(title=f"{size}; {options.step_ms:g} ms a pass; {os.cpu_count()} cores, {options.rounds} rounds")
    base = next(iter(rounds))
    for heading in ("mode", "samples/s", f"over {base}", "min", "max", "engine idle", "staleness mean", "max"):
        table.add_column(heading)
    for name, done in rounds.items():
        ratios = [own.samples_per_s / other.samples_per_s for own, other in zip(done, rounds[base], strict=True)]
        table.add_row(
            name,
            f"{median(own.samples_per_s for own in done):.2f}",
            *(f"{value:.2f}" for value in (median(ratios), min(ratios), max(ratios))),
            f"{median(own.idle_share for own in done):.0%}",
            f"{median(own.mean_staleness for own in done):.2f}",
            f"{max(own.max_staleness for own in done)}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
