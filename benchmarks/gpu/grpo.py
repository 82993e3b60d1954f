"""GRPO steps on one GPU, trainer and SGLang colocated: where the time of a step goes, and the gap of log-probs.

    python -m benchmarks.gpu.grpo [--shapes qwen3-0.6B] [--transports disk tensor] [--steps 5] [--flags ...]

Each step samples 32 prompts x 8 answers of up to 1,024 tokens, computes old log-probs, takes one optimizer step and
sends the weights. Weights are random, so answers run to the end, and rewards are random; medians leave out the first
two steps (--warm-up). `weights` includes that the trainer goes to sleep and the engine's cache wakes up; `sending
alone` does not. `rest` is what no phase covers. A second table says of each step, warm-ups included, what training did
besides computing: graphs compiled, blocks asked of the GPU. Flags after --flags go to slime as they are.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from scripts.random_checkpoint import SHAPES, write_checkpoint

WARM_UP = 2
PHASES = {
    "rollout": "perf/rollout_time",
    "to training": "perf/to_training_time",
    "log-probs": "perf/log_probs_time",
    "train": "perf/train_time",
    "weights": "perf/update_weights_time",
}
COUNTS = {
    "micro-batches": "perf/micro_batches",
    "train s": "perf/actor_train_time",
    "tokens/s": "perf/actor_train_tok_per_s",
    "graphs": "perf/train_graphs",
    "compile s": "perf/train_compile_time",
    "cudaMallocs": "perf/train_cuda_mallocs",
    "retries": "perf/train_cuda_malloc_retries",
}
COMMON = """
    --train-backend fsdp --colocate --actor-num-gpus-per-node 1 --rollout-engine sglang --apply-chat-template
    --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
    --rm-type random --advantage-estimator grpo --lr 1e-6 --use-dynamic-batch-size --max-tokens-per-gpu 16384
    --input-key prompt
"""


def main() -> None:
    """Runs every shape and transport and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6B"], choices=SHAPES)
    parser.add_argument("--transports", nargs="+", default=["disk", "tensor"])
    parser.add_argument("--response-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5, help="that count")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps before them")
    parser.add_argument("--logs", type=Path, default=Path("runs/benchmark-grpo"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    table = Table(title="Seconds of a GRPO step, 256 samples, one GPU colocated")
    names = [
        *PHASES,
        "rest",
        "step",
        "sending alone",
        "rollout tokens/s",
        "mean log-prob gap",
        "largest step's gap",
        "start, s",
    ]
    for name in ("shape", "transport", *names):
        table.add_column(name)
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            model, prompts = Path(folder, "model"), Path(folder, "prompts.jsonl")
            write_checkpoint(shape, model)
            write_prompts(prompts)
            length = ["--rollout-max-response-len", str(args.response_len)]
            for transport in args.transports:
                run_dir = args.logs / f"{shape}-{transport}"
                start_s = run(model, prompts, transport, run_dir, args.warm_up + args.steps, [*length, *args.flags])
                table.add_row(shape, transport, *measured(read(run_dir)[args.warm_up :]), f"{start_s:.0f}")
                Console(width=200).print(table)
                Console(width=200).print(counts(read(run_dir), f"Training of {shape}, {transport}, step by step"))


def write_prompts(path: Path) -> None:
    """512 prompts of some 100 to 200 bytes, which are as many tokens."""
    rng = random.Random(0)
    rows = [" ".join(str(rng.randrange(1000)) for _ in range(rng.randrange(25, 50))) for _ in range(512)]
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))


def run(model: Path, prompts: Path, transport: str, run_dir: Path, steps: int, flags: list[str]) -> float:
    """One run; returns the seconds until its first step began. Raises CalledProcessError where it fails."""
    own = ["--hf-checkpoint", str(model), "--prompt-data", str(prompts), "--run-dir", str(run_dir)]
    own += ["--num-rollout", str(steps), "--update-weight-transport", transport]
    begin = time.time()
    subprocess.run([sys.executable, "train.py", *COMMON.split(), *own, *flags], check=True)
    seconds = time.time() - begin
    return seconds - sum(row["perf/step_time"] for row in read(run_dir))


def read(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of each step, in order."""
    steps: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["axis"] in ("rollout/step", "train/step"):
            steps.setdefault(row["step"], {}).update(row["metrics"])
    return [steps[step] for step in sorted(steps)]


def counts(rows: list[dict[str, float]], title: str) -> Table:
    """What training did in each step."""
    table = Table(title=title)
    for name in ("step", *COUNTS):
        table.add_column(name, justify="right")
    for step, row in enumerate(rows):
        table.add_row(str(step), *(f"{row.get(key, 0.0):,.6g}" for key in COUNTS.values()))
    return table


def measured(rows: list[dict[str, float]]) -> list[str]:
    """The columns of one run, from the metrics of its steps."""
    seconds = {name: median(row.get(key, 0.0) for row in rows) for name, key in PHASES.items()}
    seconds["train"] -= seconds["log-probs"]  # which are a part of it
    step = median(row["perf/step_time"] for row in rows)
    rest = step - sum(seconds.values())
    gaps = [row["train/train_rollout_logprob_abs_diff"] for row in rows]
    speed = median(row["perf/tokens_per_sec"] for row in rows)
    sending = median(row["perf/send_weights_time"] for row in rows)
    times = [f"{value:.2f}" for value in (*seconds.values(), rest, step, sending)]
    return [*times, f"{speed:,.0f}", f"{median(gaps):.4f}", f"{max(gaps):.4f}"]


if __name__ == "__main__":
    main()
