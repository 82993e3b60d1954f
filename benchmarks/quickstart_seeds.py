"""The quickstart for three seeds: held-out accuracy before and after GRPO, wall time, and the curves as a picture.

python -m benchmarks.quickstart_seeds [--seeds 0 1 2] [--output runs/quickstart-seeds] [--picture FILE]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from slime.cli.quickstart import EVAL_NAME, LEARNED
from slime.observability.tracking import Series, read_metrics


class Curve(NamedTuple):
    """One seed. held_out: greedy accuracy by rollouts trained. reward: of sampled responses, by rollout."""

    seed: int
    seconds: float
    held_out: Series
    reward: Series


def run_seed(seed: int, root: Path) -> Curve:
    """Run `slime quickstart` in a process of its own, as a newcomer does."""
    directory = root / f"seed-{seed}"
    command = [sys.executable, "-m", "slime.cli.main", "quickstart", "--seed", str(seed), "--output", str(directory)]
    start = time.monotonic()
    subprocess.run(command, check=True, timeout=900)
    seconds = time.monotonic() - start
    metrics = read_metrics(directory / "grpo")
    return Curve(
        seed,
        seconds,
        metrics["eval/step"][f"eval/{EVAL_NAME}"],
        metrics["rollout/step"]["rollout/raw_reward"],
    )


def draw(curves: list[Curve], path: Path) -> None:
    """Held-out accuracy (solid) and training reward (thin) of every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.6), dpi=160)
    for curve in curves:
        (line,) = axes.plot(curve.held_out.steps, curve.held_out.values, marker="o", label=f"seed {curve.seed}")
        axes.plot(curve.reward.steps, curve.reward.values, color=line.get_color(), linewidth=0.8, alpha=0.5)
    axes.axhline(0.9, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="rollouts trained on (512 responses each)", ylabel="accuracy", ylim=(0, 1.02))
    axes.set_title("slime quickstart: held-out accuracy (dots) and reward in training (thin)", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Run, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart-seeds"))
    parser.add_argument("--picture", type=Path, default=None, help="default: OUTPUT/learning_curve.png")
    options = parser.parse_args()
    curves = [run_seed(seed, options.output) for seed in options.seeds]
    draw(curves, options.picture or options.output / "learning_curve.png")
    table = Table(title="slime quickstart")
    for heading in ("seed", "held-out before GRPO", "held-out after", "wall time"):
        table.add_column(heading)
    for curve in curves:
        values = curve.held_out.values
        table.add_row(str(curve.seed), f"{values[0]:.3f}", f"{values[-1]:.3f}", f"{curve.seconds:.0f} s")
    Console(width=90).print(table)
    if not all(curve.held_out.values[0] <= 0.5 and curve.held_out.values[-1] >= LEARNED for curve in curves):
        sys.exit(f"not every seed rose from at most 0.5 to at least {LEARNED}")


if __name__ == "__main__":
    main()
