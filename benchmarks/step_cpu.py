"""Seconds of one GRPO step: slime against TRL's `GRPOTrainer`, on the CPU, in turn, each in processes of its own.

Same model (random Qwen3, 4 layers of 256), same 16 prompts a step, 8 responses of 64 tokens each, same reward, same
AdamW step on all 128, float32, same number of threads. Nobody can end a response early: the model cannot sample the
end-of-text token. Counted from the end of one step to the end of the next:

    slime   sampling over HTTP through the router, rewards, packing, forward and backward, AdamW, weights to the engine
    TRL     `model.generate` on the padded batch, rewards, forward and backward, AdamW; weights need not move

    python -m benchmarks.step_cpu [--steps 8] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

NUM_PROMPTS = 16
GROUP = 8
NUM_TOKENS = 64
WARM_UP = 2  # steps left out at the start
LR = 1e-4


def reward_of(text: str) -> float:
    """Share of digits: any number will do, the step costs the same."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


async def slime_reward(args: Any, sample: Any, **kwargs: Any) -> float:
    """The reward as slime calls it."""
    return reward_of(sample.response)


def make_model(directory: Path) -> None:
    """A random model whose tokenizer's end-of-text token lies outside the model's vocabulary: it is never sampled."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from slime.cli.quickstart_data import make_tokenizer

    tokenizer = make_tokenizer()
    vocab_size = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def prompts(count: int) -> list[str]:
    """Prompts of mixed length, all different."""
    return [f"question {i}: what is {'very ' * (i % 5)}much {i} + {2 * i}? answer: " for i in range(count)]


def slime_seconds(directory: Path, steps: int) -> list[float]:
    """Wall time of each step after the warm-up, as the driver recorded it."""
    data = directory / "prompts.jsonl"
    rows = prompts(NUM_PROMPTS * steps)
    data.write_text("".join(json.dumps({"input": text, "label": ""}) + "\n" for text in rows))
    run_dir = directory / "slime-run"
    settings = {
        "train_backend": "fsdp",
        "device": "cpu",
        "colocate": True,
        "actor_num_gpus_per_node": 1,
        "hf_checkpoint": str(directory / "model"),
        "prompt_data": str(data),
        "custom_rm_path": "benchmarks.step_cpu.slime_reward",
        "rollout_batch_size": NUM_PROMPTS,
        "n_samples_per_prompt": GROUP,
        "rollout_max_response_len": NUM_TOKENS,
        "num_rollout": steps,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 16384,
        "lr": LR,
        "run_dir": str(run_dir),
    }
    config = directory / "slime.yaml"
    config.write_text(yaml.safe_dump(settings))
    subprocess.run([sys.executable, "train.py", "--config", str(config)], check=True, timeout=900)
    from slime.observability.tracking import read_metrics

    metrics = read_metrics(run_dir)["rollout/step"]
    assert metrics["rollout/response_len/min"].values[-1] == NUM_TOKENS
    return metrics["perf/step_time"].values[WARM_UP:]


def trl_seconds(directory: Path, steps: int) -> list[float]:
    """The same of TRL, run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step_cpu", "--trl-worker", str(directory), "--steps", str(steps)]
    output = subprocess.run(command, check=True, timeout=900, capture_output=True, text=True).stdout
    seconds: list[float] = json.loads(output.splitlines()[-1])
    return seconds[WARM_UP:]


def trl_worker(directory: Path, steps: int) -> None:
    """Run TRL and print the seconds of its steps as the last line."""
    import time

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(os.cpu_count() or 1)

    class Clock(TrainerCallback):
        """Stamps the end of each step."""

        def __init__(self) -> None:
            self.stamps = [time.monotonic()]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.stamps.append(time.monotonic())

    def reward(completions: Sequence[str], **kwargs: Any) -> list[float]:
        return [reward_of(text) for text in completions]

    config = GRPOConfig(
        output_dir=str(directory / "trl-run"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=NUM_PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=NUM_TOKENS,
        max_steps=steps,
        beta=0.0,
        loss_type="grpo",
        learning_rate=LR,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=str(directory / "model"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts(NUM_PROMPTS * steps)}),
        callbacks=[clock],
    )
    trainer.train()
    print(json.dumps([end - start for start, end in zip(clock.stamps, clock.stamps[1:], strict=False)]))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl-worker", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl_worker:
        trl_worker(Path(options.trl_worker), options.steps)
        return
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "model")
        for _ in range(options.rounds):
            theirs += trl_seconds(Path(name), options.steps)
            ours += slime_seconds(Path(name), options.steps)
    table = Table(
        title=f"One GRPO step: {NUM_PROMPTS} x {GROUP} responses of {NUM_TOKENS} tokens, {os.cpu_count()} cores"
    )
    for heading in ("", "s/step (median)", "min", "max", "steps"):
        table.add_column(heading)
    for label, values in (("TRL GRPOTrainer", theirs), ("slime", ours)):
        figures = (f"{value:.2f}" for value in (statistics.median(values), min(values), max(values)))
        table.add_row(label, *figures, str(len(values)))
    table.add_row("slime / TRL", f"{statistics.median(ours) / statistics.median(theirs):.2f}", "", "", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
