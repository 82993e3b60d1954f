"""The FSDP backend's features on two GPUs over NCCL: they train as one does, save and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, make_recipe, random_batch, run_ranks, settings_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, found {torch.cuda.device_count()}"),
]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"bf16": False},
    "offloaded": {"bf16": False, "fsdp_cpu_offload": True},
    "reference offloaded": {"bf16": False, "offload_ref": True, "use_kl_loss": True, "kl_loss_coef": 0.1},
    "float16": {"fp16": True, "initial_loss_scale": 2.0**40},
}
LIMITS = {"float16": 5e-2}  # of the gradient norm of the last rollout, relative; else 1e-4


def train(model: Path, out: Path, device: str) -> None:
    """Rollouts of each variant, a save beside the last, and that last once more from the save."""
    size = dist.get_world_size()
    found: dict[str, Any] = {}
    for name, variant in VARIANTS.items():
        save = str(out / f"{name} {size}")
        shared = {"actor_num_gpus_per_node": size, "lr": 1e-4, "adam_eps": 1e-4, "clip_grad": 0.05, "num_rollout": 32}
        settings = shared | variant | {"torch_compile": False, "log_probs_chunk_size": 512}
        args = settings_for(model, save=save, async_save=True, **settings)
        backend = make_backend(args, device)
        backend.load()
        recipe = make_recipe(backend, args, out)
        for seed in range(31):
            recipe.train(seed, random_batch(seed=seed, group_sizes=(3, 1, 4)))
        backend.save(30)
        metrics = recipe.train(31, random_batch(seed=31, group_sizes=(3, 1, 4)))
        backend.finish_save()
        weights = full_weights(backend)
        again = make_backend(settings_for(model, load=save, **settings), device)
        assert again.load() == 31
        repeated = make_recipe(again, args, out).train(31, random_batch(seed=31, group_sizes=(3, 1, 4)))
        found[name] = {"metrics": metrics, "repeated": repeated, "weights": weights, "again": full_weights(again)}
    if dist.get_rank() == 0:
        torch.save(found, out / f"{size}.pt")


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one GPU found, and what two did."""
    folder = tmp_path_factory.mktemp("ranks")
    model = make_tiny_model(folder / "model", hidden_size=256, head_dim=64, initializer_range=0.02)
    for size in (1, 2):
        run_ranks(train, size, model, folder, "cuda", store=folder / f"store_{size}", device="cuda", cpu_backend="gloo")
    one, two = (torch.load(folder / f"{size}.pt", weights_only=False) for size in (1, 2))
    return one, two


@pytest.mark.parametrize("name", VARIANTS)
def test_two_gpus_train_as_one(name: str, computed: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = (found[name]["metrics"] for found in computed)
    assert two["train/skipped_steps"] == 0
    assert two.get("train/overflowed_steps", 0) == 0
    assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=LIMITS.get(name, 1e-4))


@pytest.mark.parametrize("name", VARIANTS)
def test_two_gpus_go_on_from_a_save_written_beside_training(
    name: str, computed: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    two = computed[1][name]
    assert two["repeated"]["train/grad_norm"] == pytest.approx(two["metrics"]["train/grad_norm"], rel=1e-3)
    for weight, tensor in two["weights"].items():
        assert (two["again"][weight] - tensor).abs().max() < 1e-4, weight


def test_offloading_changes_no_number(computed: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for found in computed:
        for weight, tensor in found["plain"]["weights"].items():
            assert (found["offloaded"]["weights"][weight] - tensor).abs().max() < 1e-5, weight
