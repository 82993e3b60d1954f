"""The quickstart's task learned on a GPU: SGLang samples, FSDP2 or Megatron trains, colocated, from one warm start.

    python -m benchmarks.gpu.learning [--seeds 0 1 2] [--train-backend megatron] [--transport tensor] [--flags ...]

Prints held-out accuracy before and after GRPO for each seed, the gap between the trainer's and the engine's log-probs,
and the mean reward of each tenth of the run: curves to lay over another backend's. The warm start is FSDP2's, on the
CPU. Flags after --flags go to slime as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from slime.arguments import parse_args
from slime.cli.quickstart import grpo_settings, held_out, new_directory, sft_settings, write_settings
from slime.cli.quickstart_data import make_tiny_model, write_task
from slime.driver import train

GPU = ["--device", "cuda", "--rollout-engine", "sglang", "--sglang-dtype", "bfloat16"]


def main() -> None:
    """Runs every seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-backend", default="fsdp", choices=["fsdp", "megatron"])
    parser.add_argument("--transport", default="tensor")
    parser.add_argument("--output", type=Path, help="default: runs/benchmark-learning-BACKEND")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    output = args.output or Path(f"runs/benchmark-learning-{args.train_backend}")
    table = Table(title=f"Held-out accuracy, SGLang and {args.train_backend} on one GPU")
    for name in ("seed", "before", "after", "mean log-prob gap, first step", "last step", "s", "mean reward by tenths"):
        table.add_column(name)
    for seed in args.seeds:
        start = time.monotonic()
        directory = output / f"seed-{seed}"
        new_directory(directory)
        files = write_task(directory / "data", seed)
        model = make_tiny_model(directory / "model", seed)
        sft = write_settings(directory / "sft.yaml", sft_settings(directory, files, model, seed))
        train(parse_args(["--config", str(sft)]))
        grpo = write_settings(directory / "grpo.yaml", grpo_settings(directory, files, seed))
        flags = [*GPU, "--train-backend", args.train_backend, "--update-weight-transport", args.transport, *args.flags]
        run_dir = train(parse_args(["--config", str(grpo), *flags]))
        before, after = held_out(run_dir)
        gaps = log_prob_gaps(run_dir)
        seconds = time.monotonic() - start
        accuracy, shown_gaps = (f"{before:.3f}", f"{after:.3f}"), (f"{gaps[0]:.4f}", f"{gaps[-1]:.4f}")
        table.add_row(str(seed), *accuracy, *shown_gaps, f"{seconds:.0f}", curve(run_dir))
        Console(width=170).print(table)


def log_prob_gaps(run_dir: Path) -> list[float]:
    """Mean absolute difference of the response tokens' log-probs, trainer and engine, at each step."""
    return values(run_dir, "train/step", "train/train_rollout_logprob_abs_diff")


def curve(run_dir: Path) -> str:
    """Mean rewards of ten equal parts of the run, the first steps first."""
    rewards = values(run_dir, "rollout/step", "rollout/raw_reward")
    cuts = [round(part * len(rewards) / 10) for part in range(11)]
    parts = (rewards[start:end] for start, end in itertools.pairwise(cuts) if start < end)
    return " ".join(f"{mean(part):.2f}" for part in parts)


def values(run_dir: Path, axis: str, name: str) -> list[float]:
    """A metric, step by step."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["metrics"][name] for row in rows if row["axis"] == axis]


if __name__ == "__main__":
    main()
