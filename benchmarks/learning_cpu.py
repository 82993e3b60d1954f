"""What each estimator learns on the quickstart's task: same warm start, same prompts, same number of rollouts.

For every seed one warm start, then one run an estimator from it. Distillation's teacher is the model that GRPO left
for the same seed, a model tag of the trainer. Prints held-out accuracy before and after, the rollouts until it first
stood at 0.8, and for PPO what the critic explained of the returns' variance in its best rollout (where all answers are
right there is none to explain); draws the curves. A second call with the same --output goes on where the first one was
stopped.

    python -m benchmarks.learning_cpu [--seeds 0 1 2] [--estimators grpo ppo ...] [--jobs 2] [--picture FILE]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from slime.cli import quickstart
from slime.cli.quickstart_data import TaskFiles, make_tiny_model, write_task
from slime.observability.tracking import Series, read_metrics

GOAL = 0.8
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {},
    "rloo": {},
    "gspo": {"eps_clip": 0.1},
    "cispo": {"eps_clip": 1.0, "eps_clip_high": 1.0},
    "reinforce_plus_plus": {"normalize_advantages": True},
    "reinforce_plus_plus_baseline": {"normalize_advantages": True},
    "ppo": {"normalize_advantages": True, "lambd": 0.95, "critic_lr": 3e-3, "num_critic_only_steps": 8},
    "on_policy_distillation": {},
}


def train(directory: Path, name: str, settings: dict[str, Any]) -> Path:
    """One run in a process of its own, unless it has ended before with these settings. Returns its run directory."""
    config, done_with = directory / f"{name}.yaml", directory / f"{name}.done"
    log = directory / f"{name}.log"
    text = yaml.safe_dump(settings, sort_keys=False)
    if done_with.is_file() and done_with.read_text() == text:
        return Path(settings["save"])
    config.write_text(text)
    with log.open("w") as file:
        command = [sys.executable, "-m", "slime.cli.main", "train", "--config", str(config)]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=1200)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{log.read_text()[-3000:]}")
    done_with.write_text(text)
    return Path(settings["save"])


def warm_start(directory: Path, seed: int) -> TaskFiles:
    """The quickstart's data, model and warm start in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    files = write_task(directory / "data", seed)
    model = make_tiny_model(directory / "model", seed)
    train(directory, "sft", quickstart.sft_settings(directory, files, model, seed))
    return files


def run(directory: Path, files: TaskFiles, seed: int, estimator: str) -> Path:
    """Train with `estimator` from the warm start in `directory`."""
    settings = quickstart.grpo_settings(directory, files, seed)
    settings |= {"advantage_estimator": estimator, "num_threads": 1} | SETTINGS[estimator]
    settings |= {"save": str(directory / estimator), "save_hf": str(directory / estimator / "hf")}
    if estimator == "on_policy_distillation":
        settings["opd_teacher_load"] = str(directory / "grpo" / "hf")
    return train(directory, estimator, settings)


def steps_to(curve: Series) -> int | None:
    """Rollouts until the accuracy first stood at the goal."""
    return next((step for step, value in zip(curve.steps, curve.values, strict=True) if value >= GOAL), None)


def draw(curves: dict[str, list[Series]], path: Path) -> None:
    """The mean over seeds of each estimator, and every seed thin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.6, 4.2), dpi=160)
    for estimator, seeds in curves.items():
        mean = [statistics.fmean(values) for values in zip(*(curve.values for curve in seeds), strict=True)]
        (line,) = axes.plot(seeds[0].steps, mean, marker="o", markersize=3, label=estimator)
        for curve in seeds:
            axes.plot(curve.steps, curve.values, color=line.get_color(), linewidth=0.6, alpha=0.35)
    axes.axhline(GOAL, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="rollouts trained on (512 responses each)", ylabel="held-out accuracy", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Run, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--estimators", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--picture", type=Path, default=None, help="default: OUTPUT/learning.png")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    options = parser.parse_args()
    directories = {seed: options.output / f"seed-{seed}" for seed in options.seeds}
    # Distillation last: its teacher is what GRPO left.
    ordered = sorted(options.estimators, key=lambda name: (name == "on_policy_distillation", name != "grpo"))
    files = {seed: warm_start(directory, seed) for seed, directory in directories.items()}
    with ThreadPoolExecutor(options.jobs) as pool:
        students = [name for name in ordered if name == "on_policy_distillation"]
        for wave in (ordered[: len(ordered) - len(students)], students):
            jobs = [(name, seed) for name in wave for seed in options.seeds]
            list(pool.map(lambda job: run(directories[job[1]], files[job[1]], job[1], job[0]), jobs))
    table = Table(title=f"Held-out accuracy after {quickstart.GRPO_SETTINGS['num_rollout']} rollouts")
    for heading in ("estimator", "before", "after, each seed", f"rollouts to {GOAL}", "explained variance"):
        table.add_column(heading)
    curves: dict[str, list[Series]] = {}
    for name in options.estimators:
        metrics = [read_metrics(directories[seed] / name) for seed in options.seeds]
        curves[name] = [m["eval/step"][f"eval/{quickstart.EVAL_NAME}"] for m in metrics]
        explained = [m["train/step"].get("train/explained_variance") for m in metrics]
        table.add_row(
            name,
            " ".join(f"{curve.values[0]:.2f}" for curve in curves[name]),
            " ".join(f"{curve.values[-1]:.2f}" for curve in curves[name]),
            " ".join(str(steps_to(curve) or "-") for curve in curves[name]),
            " ".join(f"{max(series.values):.2f}" for series in explained if series is not None),
        )
    draw(curves, options.picture or options.output / "learning.png")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
