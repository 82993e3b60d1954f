"""Seconds of one GRPO step on one GPU: slime (SGLang, FSDP2, colocated), then TRL's `GRPOTrainer`.

    python -m benchmarks.gpu.trl [--shape qwen3-0.6B] [--engines vllm batching] [--trl-site DIR] [--flags ...]

The same random model, 32 prompts a step, 8 answers of 1,024 tokens each, random rewards, one AdamW step on all 256
(float32 weights, bfloat16 products). Counted from the end of one step to the end of the next; medians leave out the
first two (--warm-up).

vllm: TRL with vLLM in the trainer's process, asleep while it trains, where vLLM is installed.
batching: TRL with the continuous batching of transformers.
TRL computes micro-batches of 16 samples, slime packs up to 16,384 tokens. Flags after --flags go to slime.

TRL and vLLM may lie beside SGLang's packages, or in a folder of their own: `pip install --target DIR trl vllm`, then
--trl-site DIR. Of SGLang's packages flash-attn-4 is hidden from TRL's process: its folder `flash_attn` has no
`flash_attn.ops`, and vLLM takes it for the older flash-attn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu import grpo
from scripts.random_checkpoint import SHAPES, write_checkpoint

PROMPTS, GROUP, RESPONSE_LEN = 32, 8, 1024
MICRO_BATCH = 16
ENGINES: dict[str, dict[str, Any]] = {
    "vllm": {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.4,
        "vllm_enable_sleep_mode": True,
    },
    "batching": {"use_transformers_continuous_batching": True},
}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="qwen3-0.6B", choices=SHAPES)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES, help="the first that runs")
    parser.add_argument("--trl-python", default=sys.executable, help="the interpreter that has TRL")
    parser.add_argument("--trl-site", type=Path, help="a folder of packages that TRL's process looks in first")
    parser.add_argument("--steps", type=int, default=4, help="that count")
    parser.add_argument("--warm-up", type=int, default=grpo.WARM_UP, help="steps before them")
    parser.add_argument("--limit-s", type=float, default=900.0, help="for each run of TRL")
    parser.add_argument("--logs", type=Path, default=Path("runs/benchmark-trl"))
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "DIR"), help=argparse.SUPPRESS)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], Path(options.worker[1]), options.steps)
        return
    table = Table(title=f"One GRPO step, {options.shape} shape: {PROMPTS} x {GROUP} answers of {RESPONSE_LEN} tokens")
    for heading in ("", "s/step (median)", "min", "max", "slime's share"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = Path(folder, "model"), Path(folder, "prompts.jsonl")
        write_checkpoint(options.shape, model)
        grpo.write_prompts(prompts)
        steps = options.warm_up + options.steps
        length = ["--rollout-max-response-len", str(RESPONSE_LEN)]
        grpo.run(model, prompts, "auto", options.logs / "slime", steps, [*length, *options.flags])
        ours = [row["perf/step_time"] for row in grpo.read(options.logs / "slime")][options.warm_up :]
        add_row(table, "slime", ours, ours)
        for engine in options.engines:
            log = options.logs / f"trl-{engine}.log"
            theirs = trl_seconds(options, engine, Path(folder), log)
            add_row(table, f"TRL, {engine}", theirs[options.warm_up :], ours)
            Console(width=100).print(table)
            if theirs:
                return


def add_row(table: Table, name: str, seconds: list[float], ours: list[float]) -> None:
    """One trainer's row; without steps it says that there are none."""
    if not seconds:
        table.add_row(name, "did not run: see its log")
        return
    share = median(ours) / median(seconds)
    table.add_row(name, *(f"{value:.2f}" for value in (median(seconds), min(seconds), max(seconds), share)))


def trl_seconds(options: argparse.Namespace, engine: str, folder: Path, log: Path) -> list[float]:
    """Seconds of each step, run in a process of its own; empty where it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    steps = str(options.warm_up + options.steps)
    command = [options.trl_python, "-m", "benchmarks.gpu.trl", "--worker", engine, str(folder), "--steps", steps]
    places = [options.trl_site, os.environ.get("PYTHONPATH")]
    python_path = os.pathsep.join(str(place) for place in places if place)
    environment = os.environ | ({"PYTHONPATH": python_path} if python_path else {})
    stamps = folder / "stamps.json"
    stamps.unlink(missing_ok=True)
    with log.open("w") as output:
        try:
            subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=options.limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            output.write(f"\nended after {options.limit_s:g} s\n")
    seconds: list[float] = json.loads(stamps.read_text()) if stamps.exists() else []
    return seconds


def hide_partial_flash_attn() -> None:
    """Make this process know no `flash_attn` where there is one without its `ops`; before vLLM is imported."""
    spec = importlib.util.find_spec("flash_attn")
    places = spec.submodule_search_locations if spec is not None else None
    if places is not None and not any(Path(place, "ops").is_dir() for place in places):
        sys.modules["flash_attn"] = None  # type: ignore[assignment]


def worker(engine: str, folder: Path, steps: int) -> None:
    """Run TRL and leave the seconds of its steps in stamps.json."""
    import random
    import time

    hide_partial_flash_attn()
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        """Stamps the end of each step."""

        def __init__(self) -> None:
            self.stamps = [time.monotonic()]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.stamps.append(time.monotonic())
            pairs = zip(self.stamps, self.stamps[1:], strict=False)
            (folder / "stamps.json").write_text(json.dumps([end - start for start, end in pairs]))

    def reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [random.random() for _ in completions]

    rows = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    config = GRPOConfig(
        output_dir=str(folder / "trl-run"),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=PROMPTS * GROUP // MICRO_BATCH,
        num_generations=GROUP,
        max_completion_length=RESPONSE_LEN,
        max_steps=steps,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        bf16=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **ENGINES[engine],
    )
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": row}] for row in rows]}),
        callbacks=[Clock()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
