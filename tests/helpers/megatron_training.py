"""One rank's Megatron backend, and runs of it that are compared. Without a GPU: inside `megatron_on_cpu`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.training import full_weights, make_backend, make_recipe, random_batch, settings_for

from slime.arguments import Args
from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.shared.precision import compute_dtype
from slime.training.backend import TrainBackend
from slime.training.critic import CriticRecipe

Weights = dict[str, torch.Tensor]
STEADY = {"adam_eps": 1e-4, "lr": 1e-3}  # Adam divides by the root of squares: tiny gradients would amplify rounding
DYNAMIC = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 40, "num_steps_per_rollout": 2}


class Run(NamedTuple):
    """metrics: of each rollout. weights: after the last."""

    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


def save_run(
    name: str, model: Path, folder: Path, parallel: dict[str, Any] | None, *, device: Literal["cpu", "cuda"] = "cpu"
) -> None:
    """Train `model` on all ranks of the world, with Megatron as `parallel` says or with FSDP; rank 0 writes the Run."""
    args = settings_for(model, bf16=False, torch_compile=False, **STEADY | DYNAMIC)
    backend = make_backend(args, device) if parallel is None else make_megatron(args, device=device, **parallel)
    backend.load()
    run = two_rollouts(backend, args, folder)
    if dist.get_rank() == 0:
        weights = {tensor_name: tensor.cpu() for tensor_name, tensor in run.weights.items()}
        torch.save((run.metrics, weights), folder / f"{name}.pt")


def assert_equal_runs(ours: Path, theirs: Path, *, tolerance: float = 1e-5) -> None:
    """Metrics and weights of two runs that `save_run` wrote."""
    run, expected = (Run(*torch.load(path)) for path in (ours, theirs))
    for metrics, other in zip(run.metrics, expected.metrics, strict=True):
        assert metrics == pytest.approx(other, abs=tolerance, rel=tolerance)
    assert run.weights.keys() == expected.weights.keys()
    for name, tensor in run.weights.items():
        torch.testing.assert_close(
            tensor, expected.weights[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def make_megatron(
    args: Args, *, role: Literal["actor", "critic"] = "actor", device: str = "cpu", **parallel: Any
) -> TrainBackend:
    """This rank's backend, not yet loaded.

    parallel: fields of MegatronConfig, the context's size, and whether layers are compiled (torch_compile).
    """
    from slime.backends.megatron_utils.backend import MegatronBackend

    args = dataclasses.replace(args, context_parallel_size=parallel.pop("context_parallel_size", 1))
    place = torch.device("cpu") if device == "cpu" else torch.device(device, dist.get_rank())
    options = {"dtype": compute_dtype(args, place), "torch_compile": parallel.pop("torch_compile", False)}
    return MegatronBackend(args, MegatronConfig(**parallel), place, role=role, **options)


def two_critic_rollouts(backend: TrainBackend, args: Args) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """Train a loaded critic on two rollouts; metrics and values of each. args: the critic's settings."""
    critic = CriticRecipe(backend, args, args, phase=lambda name: contextlib.nullcontext())
    updates = [critic.train(number, random_batch(seed=number, group_sizes=(3, 1, 4))) for number in range(2)]
    return [update.metrics for update in updates], [torch.from_numpy(update.values) for update in updates]


def two_rollouts(backend: TrainBackend, args: Args, folder: Path) -> Run:
    """Train a loaded backend on two rollouts of random samples."""
    recipe = make_recipe(backend, args, folder)  # type: ignore[arg-type]
    metrics = [recipe.train(number, random_batch(seed=number, group_sizes=(3, 1, 4))) for number in range(2)]
    return Run(metrics, full_weights(backend))  # type: ignore[arg-type]


def trained(model: Path, folder: Path, rollouts: list[int], *, first: int = 0, **settings: Any) -> Weights:
    """Train from what `settings` say on `rollouts`, save after each where there is a folder; the weights afterwards."""
    parallel = settings.pop("parallel", {})
    args = settings_for(model, save=str(folder), **STEADY | {"num_steps_per_rollout": 2} | settings)
    backend = make_megatron(args, **parallel)
    assert backend.load() == first
    recipe = make_recipe(backend, args, folder)  # type: ignore[arg-type]
    for number in rollouts:
        recipe.train(number, random_batch(seed=number))
        backend.save(number)
    backend.finish_save()
    return full_weights(backend)  # type: ignore[arg-type]


def equal(ours: Weights, theirs: Weights) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
