"""The quickstart's task learned on a GPU: SGLang samples, FSDP2 trains, colocated; the warm start is the CPU's.

    python -m benchmarks.gpu.learning [--seeds 0 1 2] [--transport tensor] [--flags ...]

Prints held-out accuracy before and after GRPO for each seed, and the gap between the trainer's and the engine's
log-probs. Flags after --flags go to slime as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

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
    parser.add_argument("--transport", default="tensor")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-learning-gpu"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    table = Table(title="Held-out accuracy, SGLang and FSDP2 on one GPU")
    for name in ("seed", "before", "after", "mean log-prob gap, first step", "last step", "s"):
        table.add_column(name)
    for seed in args.seeds:
        start = time.monotonic()
        directory = args.output / f"seed-{seed}"
        new_directory(directory)
        files = write_task(directory / "data", seed)
        model = make_tiny_model(directory / "model", seed)
        sft = write_settings(directory / "sft.yaml", sft_settings(directory, files, model, seed))
        train(parse_args(["--config", str(sft)]))
        grpo = write_settings(directory / "grpo.yaml", grpo_settings(directory, files, seed))
        flags = [*GPU, "--update-weight-transport", args.transport, *args.flags]
        run_dir = train(parse_args(["--config", str(grpo), *flags]))
        before, after = held_out(run_dir)
        gaps = log_prob_gaps(run_dir)
        seconds = time.monotonic() - start
        table.add_row(str(seed), f"{before:.3f}", f"{after:.3f}", f"{gaps[0]:.4f}", f"{gaps[-1]:.4f}", f"{seconds:.0f}")
        Console(width=120).print(table)


def log_prob_gaps(run_dir: Path) -> list[float]:
    """Mean absolute difference of the response tokens' log-probs, trainer and engine, at each step."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["metrics"]["train/train_rollout_logprob_abs_diff"] for row in rows if row["axis"] == "train/step"]


if __name__ == "__main__":
    main()
