"""One update of PPO's critic: values -> returns -> clipped squared error, on the same rollout as the policy's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from slime.algorithms.value import error_moments, explained_variance
from slime.config import AlgorithmConfig, OptimizerConfig
from slime.data.batch import TrainBatch
from slime.data.packed import PackedBatch
from slime.training.advantages import attach_advantages
from slime.training.backend import TrainBackend, Wants
from slime.training.estimators import mean_weights
from slime.training.loss import value_loss
from slime.training.plan import everything, plan_steps, whole_batch
from slime.training.recipe import Phase, mean_over_steps


class CriticUpdate(NamedTuple):
    """metrics: `train/*`. values: float32, one a response token of the batch, from before the update."""

    metrics: dict[str, float]
    values: NDArray[np.float32]


@dataclass
class CriticRecipe:
    """Trains the critic's `backend` on rollouts. optimizer: the critic's own settings."""

    backend: TrainBackend
    algorithm: AlgorithmConfig
    optimizer: OptimizerConfig
    phase: Phase

    def train(self, rollout_id: int, batch: TrainBatch) -> CriticUpdate:
        """One pass over the samples of a rollout. Every rank calls it with the same batch; values are the same on each.

        batch.kl: wanted with --kl-coef, which shapes the rewards that the critic learns to foresee.
        """
        cfg = self.algorithm
        steps = plan_steps(
            batch,
            self.backend.layout,
            optimizer=self.optimizer,
            weights=partial(mean_weights, cfg=cfg),
            per_token=cfg.calculate_per_token_loss,
        )
        micro_batches = everything(steps)
        with self.phase("values"):
            outputs = self.backend.log_probs(micro_batches, "critic", entropy=False)
        for micro_batch, output in zip(micro_batches, outputs, strict=True):
            assert output.values is not None
            micro_batch.values = output.values.to(micro_batch.loss_mask.device)
        # Returns are of the reward: what is done to advantages alone is not the critic's business.
        attach_advantages(batch, micro_batches, self.backend, replace(cfg, use_opd=False, normalize_advantages=False))
        loss = partial(value_loss, cfg=cfg)
        with self.phase("critic_train"):
            results = [self.backend.train_step(step, loss, wants=Wants()) for step in steps]
        metrics = {name.replace("train/", "train/critic_"): value for name, value in mean_over_steps(results).items()}
        metrics["train/value_loss"] = metrics.pop("train/critic_loss", float("nan"))
        metrics["train/value_clipfrac"] = metrics.pop("train/critic_value_clipfrac", float("nan"))
        metrics["train/explained_variance"] = self._explained_variance(micro_batches)
        parts = [(part, part.values) for part in micro_batches if part.values is not None]
        return CriticUpdate(metrics, whole_batch(self.backend, batch, parts))

    def _explained_variance(self, batches: list[PackedBatch]) -> float:
        """Of the returns, by the values before the update; over the trained tokens of all ranks."""
        shares = [
            error_moments(batch.values, batch.returns, mask_T=batch.loss_mask)
            for batch in batches
            if batch.values is not None and batch.returns is not None
        ]
        return float(explained_variance(self.backend.sum_over_data_ranks(torch.stack(shares).sum(0))))
