"""What tests of training share: a world of one process, settings, random batches, and one rank's backend."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from slime.arguments import Args
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.config.validate import resolve
from slime.data.batch import TrainBatch, batch_from_samples
from slime.training.recipe import Recipe
from slime.utils.distributed import communication
from slime.utils.types import Sample


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """torch.distributed with this process as its only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_ranks(
    body: Callable[..., None],
    num_ranks: int,
    *args: Any,
    store: Path,
    device: str = "cpu",
    cpu_backend: str | None = None,
) -> None:
    """Run `body(*args)` in `num_ranks` fresh processes, one world of gloo on CPUs, of NCCL with a GPU each.

    store: a path that does not exist yet. cpu_backend: for tensors on the host of GPUs.
    """
    backend = communication("auto", torch.device(device), cpu_backend=cpu_backend)
    mp.spawn(_rank, (num_ranks, str(store), device, backend, body, args), nprocs=num_ranks)


def _rank(
    rank: int,
    num_ranks: int,
    store: str,
    device: str,
    backend: str,
    body: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    body(*args)
    dist.barrier()
    for child in multiprocessing.active_children():  # of Megatron, for results of saves: it would outlive the rank
        child.kill()
    sys.stderr.flush()
    os._exit(0)  # without closing gloo's sockets: two ends that close at once can abort a process


def settings_for(model: str | Path, **overrides: Any) -> Args:
    """Resolved settings of a small GRPO run of `model`; 4 prompts x 2 samples unless overridden."""
    settings: dict[str, Any] = {
        "hf_checkpoint": str(model),
        "train_backend": "fsdp",
        "device": "cpu",
        "actor_num_gpus_per_node": 1,
        "rollout_num_gpus": 1,
        "prompt_data": "prompts.jsonl",
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "num_rollout": 10,
        "lr": 1e-2,
        "log_probs_chunk_size": 7,
    }
    return resolve(Args(**settings | overrides))


def make_backend(args: Args, device: str = "cpu") -> FSDPBackend:
    """This rank's backend, not yet loaded."""
    return FSDPBackend(args, args, torch.device("cpu") if device == "cpu" else torch.device("cuda", dist.get_rank()))


def make_recipe(backend: FSDPBackend, args: Args, dump_dir: Path) -> Recipe:
    """The recipe on `backend`, without timers."""
    return Recipe(backend, args, args, dump_dir=dump_dir, phase=lambda name: contextlib.nullcontext())


def random_samples(
    *, group_sizes: tuple[int, ...] = (2, 2, 2, 2), seed: int = 0, vocab_size: int = 320, masks: bool = True
) -> list[Sample]:
    """Samples of random tokens, 2 to 12 of prompt and 1 to 14 of response, some of them masked."""
    generator = np.random.default_rng(seed)
    samples = []
    for group, size in enumerate(group_sizes):
        prompt = generator.integers(0, vocab_size, generator.integers(2, 13)).tolist()
        for _ in range(size):
            response = generator.integers(0, vocab_size, generator.integers(1, 15)).tolist()
            mask = generator.integers(0, 2, len(response)).tolist()
            samples.append(
                Sample(
                    group_index=group,
                    index=len(samples),
                    tokens=prompt + response,
                    response_length=len(response),
                    loss_mask=[*mask[:-1], 1] if masks else None,
                    reward=float(generator.integers(0, 4)),
                    rollout_log_probs=generator.uniform(-7, -4, len(response)).tolist(),
                )
            )
    return samples


def random_batch(**options: Any) -> TrainBatch:
    """`random_samples` as a batch."""
    samples = random_samples(**options)
    return batch_from_samples(samples, [float(sample.reward or 0) for sample in samples])  # type: ignore[arg-type]


def full_weights(backend: FSDPBackend) -> dict[str, torch.Tensor]:
    """A copy of every tensor under its Hugging Face name; a collective."""
    return {name: tensor.clone() for name, tensor in backend.hf_tensors()}
