"""One rank's Megatron backend on the CPU, and runs of it that are compared. Import inside `megatron_on_cpu`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from helpers.training import full_weights, make_recipe, random_batch

from slime.arguments import Args
from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.training.backend import TrainBackend
from slime.training.critic import CriticRecipe

STEADY = {"adam_eps": 1e-4, "lr": 1e-3}  # Adam divides by the root of squares: tiny gradients would amplify rounding


class Run(NamedTuple):
    """metrics: of each rollout. weights: after the last."""

    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


def make_megatron(args: Args, *, role: Literal["actor", "critic"] = "actor", **parallel: Any) -> TrainBackend:
    """This rank's backend in float32, not yet loaded.

    parallel: fields of MegatronConfig, the context's size, and whether layers are compiled (torch_compile).
    """
    from slime.backends.megatron_utils.backend import MegatronBackend

    args = dataclasses.replace(args, context_parallel_size=parallel.pop("context_parallel_size", 1))
    options: dict[str, Any] = {"dtype": torch.float32, "torch_compile": parallel.pop("torch_compile", False)}
    return MegatronBackend(args, MegatronConfig(**parallel), torch.device("cpu"), role=role, **options)


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
