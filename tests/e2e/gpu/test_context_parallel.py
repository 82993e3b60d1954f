"""Two GPUs that share the tokens of every sample, over NCCL: they train as one does, and hold half each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, make_recipe, random_batch, run_ranks, settings_for

from slime.data.batch import TrainBatch, batch_from_samples
from slime.utils.types import Sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, found {torch.cuda.device_count()}"),
]

LONG = 16_384  # tokens of the sample whose memory is measured
SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.02, "max_position_embeddings": LONG}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"bf16": False, "torch_compile": False},
    "bfloat16": {"bf16": True, "torch_compile": False},
    "compiled": {"bf16": True, "torch_compile": True, "gradient_checkpointing": True},
}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "compiled": 2e-2}  # of log-probs, loss and gradient norm


def long_sample() -> TrainBatch:
    tokens = np.random.default_rng(0).integers(0, 260, LONG).tolist()
    return batch_from_samples([Sample(index=0, group_index=0, tokens=tokens, response_length=LONG // 2)], [1.0])


def train(model: Path, out: Path, device: str) -> None:
    """Two rollouts in each precision, then the long sample; rank 0 writes what it found to `out`."""
    size = dist.get_world_size()
    shared = {"context_parallel_size": size, "actor_num_gpus_per_node": size, "lr": 1e-4, "adam_eps": 1e-4}
    found: dict[str, Any] = {}
    for name, precision in PRECISIONS.items():
        args = settings_for(model, num_steps_per_rollout=2, **shared, **precision)
        backend = make_backend(args, device)
        backend.load()
        recipe = make_recipe(backend, args, out)
        metrics = [recipe.train(seed, random_batch(seed=seed, group_sizes=(3, 1, 4))) for seed in range(2)]
        found[name] = {"metrics": metrics, "weights": full_weights(backend)}
    args = settings_for(model, rewards_normalization=False, **shared, **PRECISIONS["bfloat16"])
    backend = make_backend(args, device)
    backend.load()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    make_recipe(backend, args, out).train(0, long_sample())
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    if dist.get_rank() == 0:
        torch.save(found, out / f"{size}.pt")


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one GPU found, and what two did."""
    folder = tmp_path_factory.mktemp("ranks")
    model = make_tiny_model(folder / "model", num_hidden_layers=8, **SHAPE)
    for size in (1, 2):
        run_ranks(train, size, model, folder, "cuda", store=folder / f"store_{size}", device="cuda")
    one, two = (torch.load(folder / f"{size}.pt", weights_only=False) for size in (1, 2))
    return one, two


@pytest.mark.parametrize("name", PRECISIONS)
def test_two_gpus_that_share_tokens_train_as_one(name: str, computed: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (found[name] for found in computed)
    limit = TOLERANCES[name]
    for ours, theirs in zip(two["metrics"], one["metrics"], strict=True):
        for metric in ("train/loss", "train/grad_norm", "rollout/log_probs"):
            assert ours[metric] == pytest.approx(theirs[metric], abs=limit, rel=limit), metric
    for weight, tensor in one["weights"].items():
        assert (two["weights"][weight] - tensor).abs().max() < (limit if name == "float32" else 1e-3), weight


def test_each_of_two_gpus_holds_half_of_a_long_sample(computed: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (found["peak_bytes"] for found in computed)
    print(f"peak of a sample of {LONG} tokens: {one / 2**20:.0f} MiB on one GPU, {two / 2**20:.0f} MiB on each of two")
    assert two < 0.65 * one
