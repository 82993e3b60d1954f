"""What the training loop waits for a checkpoint, with and without --async-save, on a CPU.

python -m benchmarks.save_cpu [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from slime.arguments import Args
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.config.validate import resolve
from slime.data.batch import batch_from_samples
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import LossOutput, TokenOutputs, Wants
from slime.utils.types import Sample

SHAPE = {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 64}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    table = Table("", "the loop waits, s", "a step after it, s", "on the disk after, s")
    with tempfile.TemporaryDirectory() as folder:
        lm = Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_attention_heads=8, num_key_value_heads=4))
        lm.save_pretrained(folder)
        table.title = f"Checkpoint of {lm.num_parameters() / 1e6:.0f}M parameters with AdamW, medians of {rounds}"
        times = np.array([[measure(Path(folder), is_async=kind) for kind in (False, True)] for _ in range(rounds)])
        for name, of_kind in zip(("at once", "--async-save"), times.swapaxes(0, 1), strict=True):
            table.add_row(name, *(f"{statistics.median(column):.2f}" for column in of_kind.T))
    Console().print(table)


def measure(model: Path, *, is_async: bool) -> tuple[float, float, float]:
    """Seconds of `save`, of the step after it, and from the call until all is on the disk."""
    settings = {"train_backend": "fsdp", "hf_checkpoint": str(model), "prompt_data": "unread", "num_rollout": 1}
    slots = {"actor_num_gpus_per_node": 1, "rollout_num_gpus": 1, "rollout_batch_size": 4, "n_samples_per_prompt": 2}
    args = resolve(Args(**settings, **slots, device="cpu", save=str(model / "save"), async_save=is_async))
    backend = FSDPBackend(args, args, torch.device("cpu"))
    backend.load()
    for _ in range(2):
        backend.train_step([batch()], likelihood, wants=Wants())
    backend.save(0)  # the first has the room on the host to make
    backend.finish_save()
    marks = [time.perf_counter()]
    backend.save(1)
    marks.append(time.perf_counter())
    backend.train_step([batch()], likelihood, wants=Wants())
    marks.append(time.perf_counter())
    backend.finish_save()
    marks.append(time.perf_counter())
    wait, step, rest = np.diff(marks)
    return float(wait), float(step), float(wait + step + rest if is_async else wait)


def batch() -> PackedBatch:
    """Eight samples of 128 tokens."""
    samples = [Sample(group_index=0, tokens=list(range(i, i + 128)), response_length=100) for i in range(8)]
    rollout = batch_from_samples(samples, [0.0] * len(samples))
    return pack_rows(rollout, range(len(rollout)), rollout.loss_mask / rollout.loss_mask.sum())


def likelihood(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: object) -> LossOutput:
    """Negative, of the tokens."""
    loss = -(batch.loss_weights * outputs.log_probs).sum()
    return LossOutput(loss, {"loss": loss.detach()})


if __name__ == "__main__":
    main()
