"""`slime quickstart`: a tiny model learns to carry, from a Hugging Face directory to a Hugging Face directory.

Makes the data and the model, warms it up on a careless teacher (SFT), lets GRPO find out what the teacher got wrong,
and writes the report. Both runs are ordinary `slime train --config FILE` runs whose files are left in the directory.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from slime.cli.errors import reported_errors
from slime.cli.quickstart_data import TaskFiles, make_tiny_model, write_task
from slime.config import ConfigError
from slime.utils.processes import sole_user

SHARED_SETTINGS = {
    "train_backend": "fsdp",
    "device": "cpu",
    "colocate": True,
    "actor_num_gpus_per_node": 1,
    "num_threads": 1,  # matrices this small gain nothing from a second one
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 16384,
    "rollout_max_context_len": 64,
}
SFT_SETTINGS = {
    "rollout_function_path": "slime.rollout.sft_rollout.generate_rollout",
    "loss_type": "sft_loss",
    "debug_train_only": True,
    "input_key": "messages",  # read once, in order: the easy sums come first
    "rollout_batch_size": 1920,
    "global_batch_size": 64,
    "num_rollout": 15,
    "lr": 4e-3,
}
GRPO_SETTINGS = {
    "input_key": "prompt",
    "label_key": "label",
    "apply_chat_template": True,
    "rollout_shuffle": True,
    "custom_rm_path": "slime.cli.quickstart_data.exact_match",
    "advantage_estimator": "grpo",
    "rollout_batch_size": 64,
    "n_samples_per_prompt": 8,
    "global_batch_size": 128,
    "rollout_max_response_len": 6,
    "num_rollout": 36,
    "lr": 5e-4,
    "eval_interval": 6,
    "eval_temperature": 0.0,
}
EVAL_NAME = "sums"
LEARNED = 0.9  # held-out accuracy from which the quickstart has worked


class NotLearned(RuntimeError):
    """The quickstart ran to its end and the model did not learn."""


class Result(NamedTuple):
    """Held-out accuracy before and after GRPO, wall time in seconds, and what was written."""

    before: float
    after: float
    seconds: float
    model: Path
    report: Path
    curve: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 where the model learned."""
    parser = argparse.ArgumentParser(prog="slime quickstart", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--output", metavar="DIR", help="where everything goes [runs/quickstart-seed-SEED]")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, model and sampling [0]")
    options = parser.parse_args(argv)
    directory = Path(options.output or f"runs/quickstart-seed-{options.seed}")
    with reported_errors() as outcome:
        outcome.log_dir = directory
        result = run(directory, options.seed)
        print_summary(result)
        if result.after < LEARNED:
            raise NotLearned(f"held-out accuracy is {result.after:.3f}, expected at least {LEARNED}: {result.report}")
    return outcome.code


def run(directory: Path, seed: int) -> Result:
    """The whole quickstart in `directory`, which must be new, empty, or an earlier quickstart's."""
    from slime.arguments import parse_args
    from slime.driver import train
    from slime.observability.report import write_report

    start = time.monotonic()
    new_directory(directory)
    files = write_task(directory / "data", seed)
    model = make_tiny_model(directory / "model", seed)
    print(f"warm start on {_count(files.sft)} demonstrations of a careless teacher")
    sft = write_settings(directory / "sft.yaml", sft_settings(directory, files, model, seed))
    train(parse_args(["--config", str(sft)]))
    print(f"GRPO on {_count(files.train)} prompts; {_count(files.eval)} are held out")
    grpo = write_settings(directory / "grpo.yaml", grpo_settings(directory, files, seed))
    run_dir = train(parse_args(["--config", str(grpo)]))
    report = write_report(run_dir)
    before, after = held_out(run_dir)
    trained = _newest(directory / "grpo" / "hf")
    return Result(before, after, time.monotonic() - start, trained, report.html, report.png)


def new_directory(directory: Path) -> None:
    """An empty `directory`. Raises ConfigError where it holds what no quickstart left there, or one runs there."""
    marker = directory / ".quickstart"
    if directory.exists() and any(directory.iterdir()) and not marker.exists():
        raise ConfigError(f"--output {directory} holds other things. Name a new directory.")
    for run_dir in filter(Path.is_dir, (directory / "sft", directory / "grpo")):
        try:
            with sole_user(run_dir):
                pass
        except BlockingIOError as error:
            raise ConfigError(f"--output {directory}: another quickstart runs there. Name a new directory.") from error
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    marker.touch()


def sft_settings(directory: Path, files: TaskFiles, model: Path, seed: int) -> dict[str, Any]:
    """Settings of the warm start; everything lies in `directory`."""
    return {
        **SHARED_SETTINGS,
        **SFT_SETTINGS,
        "hf_checkpoint": str(model),
        "prompt_data": str(files.sft),
        "save": str(directory / "sft"),
        "save_hf": str(directory / "sft" / "hf"),
        "rollout_seed": seed,
        "seed": seed,
    }


def grpo_settings(directory: Path, files: TaskFiles, seed: int) -> dict[str, Any]:
    """Settings of the run that starts from what the warm start left in `directory`."""
    return {
        **SHARED_SETTINGS,
        **GRPO_SETTINGS,
        "hf_checkpoint": str(directory / "sft" / "hf"),
        "prompt_data": str(files.train),
        "eval_prompt_data": [EVAL_NAME, str(files.eval)],
        "save": str(directory / "grpo"),
        "save_hf": str(directory / "grpo" / "hf" / "rollout_{rollout_id}"),
        "rollout_seed": seed,
        "seed": seed,
    }


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    """A file for --config."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def _count(path: Path) -> int:
    with path.open() as file:
        return sum(1 for _ in file)


def _newest(directory: Path) -> Path:
    return max(directory.iterdir(), key=lambda path: path.stat().st_mtime)


def held_out(run_dir: Path) -> tuple[float, float]:
    """The first and the last held-out accuracy of a run."""
    from slime.observability.tracking import read_metrics

    values = read_metrics(run_dir)["eval/step"][f"eval/{EVAL_NAME}"].values
    return values[0], values[-1]


def ask(model: Path, prompt: str) -> str:
    """What plain `transformers` makes of the saved model: its greedy answer to one chat message."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    lm: Any = AutoModelForCausalLM.from_pretrained(str(model))
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = lm.generate(**inputs, max_new_tokens=6, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def print_summary(result: Result) -> None:
    """A table of what was learned and where it lies."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="slime quickstart", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("held-out accuracy after the warm start", f"{result.before:.3f}")
    table.add_row("held-out accuracy after GRPO", f"{result.after:.3f}")
    answer = ask(result.model, "57+68=")
    table.add_row("plain transformers says 57+68=", f"{answer} (units first: {answer[::-1]})")
    table.add_row("time", f"{result.seconds:.0f} s")
    table.add_row("model", str(result.model))
    table.add_row("learning curve", str(result.curve))
    table.add_row("report", str(result.report))
    Console().print(table)
