"""One policy update, written once for all backends: reference -> old log-probs -> advantages -> optimizer steps.

Shapes: S samples of the whole rollout, T response tokens of one micro-batch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slime.algorithms import grpo, reduce
from slime.algorithms.kl import kl_estimate
from slime.config import AlgorithmConfig, OptimizerConfig
from slime.data.batch import TrainBatch
from slime.data.packed import PackedBatch, pack_rows
from slime.data.schedule import PackingLimit, plan_step, split_steps
from slime.training.backend import ModelTag, StepMetrics, TrainBackend
from slime.training.loss import loss_for, weighted_sum

logger = logging.getLogger(__name__)

Phase = Callable[[str], AbstractContextManager[None]]


class TrainingDiverged(RuntimeError):
    """More steps than allowed had a loss or gradient that was not finite."""


@dataclass
class Recipe:
    """Trains `backend` on rollouts. Owns the count of skipped steps and where their samples are written."""

    backend: TrainBackend
    algorithm: AlgorithmConfig
    optimizer: OptimizerConfig
    dump_dir: Path
    phase: Phase
    num_skipped: int = 0

    def train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        """One pass over the samples of a rollout in `num_steps_per_rollout` optimizer steps. Returns `train/*` metrics.

        Every rank calls it with the same batch and takes its own share.
        """
        steps = self._plan(batch)
        metrics: dict[str, float] = {}
        if self.algorithm.loss_type == "policy_loss":
            metrics |= self._prepare_policy(batch, steps)
        with self.phase("actor_train"):
            results = [self._step(rollout_id, index, batch, step) for index, step in enumerate(steps)]
        return metrics | _mean_over_steps(results)

    def _plan(self, batch: TrainBatch) -> list[list[PackedBatch]]:
        """This rank's micro-batches of every step, with the weights of their tokens in the step's mean."""
        layout = self.backend.layout
        limit = PackingLimit(self.optimizer.micro_batch_size)
        if self.optimizer.use_dynamic_batch_size:
            limit = PackingLimit(max_tokens=(self.optimizer.max_tokens_per_gpu or 0) * layout.context_size)
        steps = []
        for rows in split_steps(len(batch), self.optimizer.num_steps_per_rollout or 1):
            part = batch.select(rows)
            weights = _loss_weights(part, per_token=self.algorithm.calculate_per_token_loss)
            plan = plan_step(
                part.total_lengths,
                layout.data_rank,
                layout.data_size,
                limit=limit,
                balance=self.optimizer.balance_data,
                multiple_of=layout.micro_batches_multiple_of,
            )
            packed = [pack_rows(part, members, weights) for members in plan]
            for micro_batch in packed:
                micro_batch.rows = [int(rows[row]) for row in micro_batch.rows]
            steps.append(packed)
        return steps

    def _prepare_policy(self, batch: TrainBatch, steps: list[list[PackedBatch]]) -> dict[str, float]:
        """Fill in reference and old log-probs and advantages; returns `rollout/*` metrics of them."""
        everything = [micro_batch for step in steps for micro_batch in step]
        cfg = self.algorithm
        if cfg.needs_reference:
            self._attach_log_probs(everything, "ref", "ref_log_probs")
        if cfg.use_rollout_logprobs:
            _use_rollout_log_probs(everything)
        elif len(steps) > 1 or cfg.kl_coef > 0:
            self._attach_log_probs(everything, "actor", "old_log_probs")
        advantages_S = self._advantages(batch, everything)
        for micro_batch in everything:
            rows = torch.tensor(micro_batch.rows or [0])
            micro_batch.advantages = advantages_S[rows][micro_batch.sequence_ids]
        mean_advantage = float(advantages_S.mean())
        names = ("rollout/rewards", "rollout/advantages", "rollout/returns")  # of GRPO all the same: normalised rewards
        return self._log_prob_means(steps) | dict.fromkeys(names, mean_advantage)

    def _log_prob_means(self, steps: list[list[PackedBatch]]) -> dict[str, float]:
        """`rollout/{log_probs,ref_log_probs,rollout_log_probs}`, as far as there are any, weighted as the loss is."""
        fields = {
            "log_probs": "old_log_probs",
            "ref_log_probs": "ref_log_probs",
            "rollout_log_probs": "rollout_log_probs",
        }
        first = steps[0][0]
        names = [name for name, field in fields.items() if getattr(first, field) is not None]
        shares = [
            sum(weighted_sum(b.loss_weights, getattr(b, fields[name])) for step in steps for b in step)
            for name in names
        ]
        if not shares:
            return {}
        means = self.backend.sum_over_data_ranks(torch.stack(shares)) / len(steps)  # type: ignore[arg-type]
        return {f"rollout/{name}": mean for name, mean in zip(names, means.tolist(), strict=True)}

    def _attach_log_probs(self, batches: list[PackedBatch], model: ModelTag, field: str) -> None:
        with self.phase("ref_log_probs" if model == "ref" else "log_probs"):
            outputs = self.backend.log_probs(batches, model, entropy=False)
        for micro_batch, output in zip(batches, outputs, strict=True):
            setattr(micro_batch, field, output.log_probs.to(micro_batch.loss_mask.device))

    def _advantages(self, batch: TrainBatch, batches: list[PackedBatch]) -> Tensor:
        """[S] on the CPU, the same on every rank."""
        cfg = self.algorithm
        rewards_S = torch.tensor(batch.rewards)
        if cfg.kl_coef > 0:
            rewards_S = rewards_S - cfg.kl_coef * self._kl_of_samples(len(batch), batches)
        if batch.rewards_are_final or not cfg.rewards_normalization:
            return rewards_S
        return grpo.advantages(rewards_S, torch.tensor(batch.group_ids), std_normalize=cfg.grpo_std_normalization)

    def _kl_of_samples(self, num_samples: int, batches: list[PackedBatch]) -> Tensor:
        """[S] KL to the reference, summed over each sample's trained tokens and known to every rank."""
        kl_S = torch.zeros(num_samples)
        for micro_batch in batches:
            if not micro_batch.rows:
                continue
            assert micro_batch.old_log_probs is not None
            assert micro_batch.ref_log_probs is not None
            kl_T = kl_estimate(micro_batch.old_log_probs, micro_batch.ref_log_probs, self.algorithm.kl_loss_type)
            rows_T = torch.tensor(micro_batch.rows)[micro_batch.sequence_ids]
            kl_S.index_add_(0, rows_T, torch.where(micro_batch.loss_mask != 0, kl_T, 0.0))
        return self.backend.sum_over_data_ranks(kl_S)

    def _step(self, rollout_id: int, index: int, batch: TrainBatch, step: list[PackedBatch]) -> StepMetrics:
        is_policy = self.algorithm.loss_type == "policy_loss"
        result = self.backend.train_step(step, loss_for(self.algorithm), entropy=is_policy)
        if result.skipped:
            self.num_skipped += 1
            dump = self._dump(rollout_id, index, batch, step)
            logger.warning("rollout %d step %d skipped: loss or gradient not finite; %s", rollout_id, index, dump)
            if self.num_skipped > self.optimizer.max_skipped_steps:
                raise TrainingDiverged(
                    f"{self.num_skipped} optimizer steps had a loss or gradient that was not finite "
                    f"(--max-skipped-steps {self.optimizer.max_skipped_steps}). The samples of the last are in {dump}."
                )
        return result

    def _dump(self, rollout_id: int, index: int, batch: TrainBatch, step: list[PackedBatch]) -> Path:
        """Write this rank's samples of a skipped step."""
        rank = self.backend.layout.rank
        path = self.dump_dir / f"rollout_{rollout_id:06d}_step_{index:03d}_rank_{rank:04d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for micro_batch in step for row in micro_batch.rows]
        path.write_text("".join(json.dumps(record) + "\n" for record in _records(batch, rows)))
        return path


def _loss_weights(batch: TrainBatch, *, per_token: bool) -> np.ndarray:
    """float32, one a response token of the step: its share in the step's mean."""
    mask = torch.tensor(batch.loss_mask)
    if per_token:
        return reduce.per_token_weights(mask).numpy()
    sample_ids = torch.from_numpy(np.repeat(np.arange(len(batch)), batch.response_lengths))
    return reduce.per_sample_weights(mask, sample_ids, len(batch)).numpy()


def _use_rollout_log_probs(batches: list[PackedBatch]) -> None:
    for micro_batch in batches:
        if micro_batch.rollout_log_probs is None:
            raise ValueError("--use-rollout-logprobs: the rollout function returned samples without rollout_log_probs")
        micro_batch.old_log_probs = micro_batch.rollout_log_probs


def _mean_over_steps(results: list[StepMetrics]) -> dict[str, float]:
    """`train/*`: metrics of the steps that were taken, averaged."""
    taken = [result for result in results if not result.skipped]
    names = taken[0].metrics if taken else {}
    metrics = {f"train/{name}": sum(r.metrics[name] for r in taken) / len(taken) for name in names}
    metrics["train/grad_norm"] = sum(r.grad_norm for r in taken) / len(taken) if taken else math.nan
    metrics["train/lr-pg_0"] = results[-1].lr
    metrics["train/skipped_steps"] = len(results) - len(taken)
    return metrics


def _records(batch: TrainBatch, rows: list[int]) -> Iterator[dict[str, object]]:
    for row in rows:
        one = batch.select([row])
        log_probs = one.rollout_log_probs
        yield {
            "index": int(one.sample_indices[0]),
            "reward": float(one.rewards[0]),
            "tokens": one.tokens.tolist(),
            "response_length": int(one.response_lengths[0]),
            "rollout_log_probs": None if log_probs is None else log_probs.tolist(),
        }
