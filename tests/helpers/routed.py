"""Runs of a mixture of experts whose experts are kept. Any backend's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from helpers.training import make_recipe, random_samples

from slime.arguments import Args
from slime.data.batch import TrainBatch, batch_from_samples
from slime.training.backend import TrainBackend

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 4, 2  # of `make_tiny_model(..., "qwen3_moe", num_hidden_layers=4)`


def routed_batch(*, seed: int = 0, **options: Any) -> TrainBatch:
    """Random samples that an engine routed at random: not as any trainer would."""
    generator = np.random.default_rng(seed)
    samples = random_samples(seed=seed, group_sizes=(3, 1, 4), **options)
    for sample in samples:
        scores = generator.random((len(sample.tokens) - 1, NUM_LAYERS, NUM_EXPERTS))
        sample.rollout_routed_experts = scores.argsort(-1)[:, :, :TOP_K].astype(np.int16)
    return batch_from_samples(samples, [float(sample.reward or 0) for sample in samples])  # type: ignore[arg-type]


def routed_rollouts(backend: TrainBackend, args: Args, folder: Path) -> list[dict[str, float]]:
    """Metrics of two rollouts on which a loaded backend was trained; with what it recorded, or what the engine said."""
    recipe = make_recipe(backend, args, folder)  # type: ignore[arg-type]
    return [recipe.train(number, routed_batch(seed=number)) for number in range(2)]
