"""Within a step the process that trains runs ahead of its GPU: no micro-batch waits for what the GPU has computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_tiny_model

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.megatron_utils.start import open_backend
from slime.data.batch import TrainBatch, batch_from_samples
from slime.utils.types import Sample
from tests.e2e.gpu.test_megatron_backend import GPU, nccl_world, recipe_of, settings

__all__ = ["nccl_world"]
pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def groups() -> TrainBatch:
    """Four groups of four samples, each group's with one prompt."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 260, 60).tolist() for _ in range(4)]
    tokens = [prompts[index // 4] + rng.integers(0, 260, 30).tolist() for index in range(16)]
    samples = [
        Sample(index=index, group_index=index // 4, tokens=each, response_length=30)
        for index, each in enumerate(tokens)
    ]
    return batch_from_samples(samples, [float(index % 3) for index in range(16)])


def waits(call: Callable[[], Any]) -> int:
    """How often torch says that it waited for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def test_what_counts_waits_sees_them() -> None:
    values = torch.ones(3, device=GPU)
    assert waits(lambda: values.sum().item()) >= 1
    assert waits(lambda: values.sum() + 1) == 0


@pytest.mark.parametrize("kind", ["fsdp", "megatron"])
def test_only_steps_wait_for_the_gpu_not_their_micro_batches(nccl_world: None, tmp_path: Path, kind: str) -> None:
    model = make_tiny_model(tmp_path / "model", hidden_size=256, head_dim=64, initializer_range=0.02, dtype="bfloat16")
    args = settings(model, kind)
    backend = open_backend(args, args, GPU) if kind == "megatron" else FSDPBackend(args, args, GPU)
    backend.load()
    train_step, calls = backend.train_step, []
    backend.train_step = lambda *given, **named: calls.append((given, named)) or train_step(*given, **named)
    recipe_of(backend, args, tmp_path).train(0, groups())  # for the loss and the micro-batches of a real step
    ((batches, loss), named), *_ = calls
    assert len(batches) >= 3
    assert waits(lambda: backend.log_probs(batches, "actor", entropy=True)) == 0
    assert (
        waits(lambda: train_step(batches, loss, **named)) == waits(lambda: train_step(batches[:1], loss, **named)) > 0
    )
