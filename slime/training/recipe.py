"""One policy update, written once for all backends: reference -> old log-probs -> advantages -> optimizer steps."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime.algorithms.kl import kl_estimate
from slime.config import AlgorithmConfig, OptimizerConfig
from slime.data.batch import TrainBatch
from slime.data.packed import PackedBatch
from slime.training.advantages import attach_advantages
from slime.training.backend import ModelTag, StepMetrics, TrainBackend
from slime.training.dump import dump_train_data
from slime.training.estimators import estimator_of
from slime.training.hooks import postprocess
from slime.training.loss import loss_for, wants_of, weighted_sum
from slime.training.plan import Steps, everything, plan_steps, whole_batch
from slime.utils.misc import is_due

logger = logging.getLogger(__name__)

Phase = Callable[[str], AbstractContextManager[None]]


class TrainingDiverged(RuntimeError):
    """More steps than allowed had a loss or gradient that was not finite."""


class _Prepared(NamedTuple):
    """What has been computed of a rollout before its advantages: log-probs of the policies that its loss compares."""

    rollout_id: int
    steps: Steps


@dataclass
class Recipe:
    """Trains `backend` on rollouts. Owns the count of skipped steps and where their samples are written."""

    backend: TrainBackend
    algorithm: AlgorithmConfig
    optimizer: OptimizerConfig
    dump_dir: Path
    phase: Phase
    train_dump: str | None = None  # path with {rollout_id} and {rank}: where to write what was trained on
    num_skipped: int = 0
    num_micro_batches: int = 0  # of this rank, in the last rollout
    _prepared: _Prepared | None = None

    def train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        """One pass over the samples of a rollout in `num_steps_per_rollout` optimizer steps. Returns `train/*` metrics.

        Every rank calls it with the same batch and takes its own share.
        """
        steps = self._prepare(rollout_id, batch)
        self._prepared = None
        self.num_micro_batches = len(everything(steps))
        metrics: dict[str, float] = {}
        if self.algorithm.is_policy_loss:
            metrics |= self._attach_advantages(rollout_id, batch, steps)
        with self.phase("actor_train"):
            results = [self._step(rollout_id, index, batch, step) for index, step in enumerate(steps)]
        if self.train_dump is not None:
            dump_train_data(self.train_dump, rollout_id, self.backend.layout.rank, batch, steps)
        if self.algorithm.needs_reference and is_due(rollout_id, self.algorithm.ref_update_interval):
            self.backend.copy_weights("actor", "ref")
        return metrics | _policy_metrics(results, metrics) | mean_over_steps(results)

    def token_kl(self, rollout_id: int, batch: TrainBatch) -> NDArray[np.float32]:
        """Estimates of KL(policy || reference), one a response token of `batch`, the same on every rank; for a critic.

        `train` of the same rollout does not compute them again.
        """
        micro_batches = everything(self._prepare(rollout_id, batch))
        return whole_batch(self.backend, batch, [(part, part.kl) for part in micro_batches if part.kl is not None])

    def _prepare(self, rollout_id: int, batch: TrainBatch) -> Steps:
        """This rank's micro-batches, with the log-probs that losses and advantages want."""
        if self._prepared is not None and self._prepared.rollout_id == rollout_id:
            return _with_values(self._prepared.steps, batch)
        cfg = self.algorithm
        weights = estimator_of(cfg).weights
        steps = plan_steps(
            batch if cfg.use_rollout_routing_replay else dataclasses.replace(batch, routed_experts=None),
            self.backend.layout,
            optimizer=self.optimizer,
            weights=lambda mask_T, rollout_T: weights(mask_T, rollout_T, cfg),
            per_token=cfg.calculate_per_token_loss,
        )
        if cfg.is_policy_loss:
            self._attach_policies(everything(steps), has_several_steps=len(steps) > 1)
        self._prepared = _Prepared(rollout_id, steps)
        return steps

    def _attach_policies(self, batches: list[PackedBatch], *, has_several_steps: bool) -> None:
        """Log-probs of reference, teacher and old policy, and the KL to the reference."""
        cfg = self.algorithm
        if cfg.needs_reference:
            self._attach(batches, "ref", "ref_log_probs")
        if cfg.opd_teacher_load is not None:
            self._attach(batches, "teacher", "teacher_log_probs")
        if cfg.needs_teacher and any(batch.teacher_log_probs is None for batch in batches):
            raise ValueError(
                "distillation needs teacher_log_probs on every sample: give --opd-teacher-load, or a rollout that asks "
                "a teacher's engine, such as --custom-rm-path slime.rollout.on_policy_distillation.reward_func"
            )
        if cfg.use_rollout_routing_replay and any(batch.routed_experts is None for batch in batches):
            raise ValueError(
                "--use-rollout-routing-replay: the rollout returned samples without rollout_routed_experts for all "
                "tokens that are trained on"
            )
        if cfg.use_rollout_logprobs:
            _use_rollout_log_probs(batches)
        elif has_several_steps or cfg.needs_old_log_probs:
            self._attach(batches, "old_actor" if cfg.keep_old_actor else "actor", "old_log_probs")
        if cfg.kl_coef > 0:
            for batch in batches:
                assert batch.old_log_probs is not None
                assert batch.ref_log_probs is not None
                batch.kl = kl_estimate(batch.old_log_probs, batch.ref_log_probs, cfg.kl_loss_type)

    def _attach(self, batches: list[PackedBatch], model: ModelTag, field: str) -> None:
        is_policy = model.endswith("actor")
        with self.phase("log_probs" if is_policy else f"{model}_log_probs"):
            entropy = is_policy and self.algorithm.use_rollout_entropy
            outputs = self.backend.log_probs(batches, model, entropy=entropy)
        for micro_batch, output in zip(batches, outputs, strict=True):
            setattr(micro_batch, field, output.log_probs.to(micro_batch.loss_mask.device))
            if output.entropy is not None:
                micro_batch.entropy = output.entropy.to(micro_batch.loss_mask.device)

    def _attach_advantages(self, rollout_id: int, batch: TrainBatch, steps: Steps) -> dict[str, float]:
        """Returns `rollout/*` metrics of all that is known before the update, weighted as the loss is."""
        micro_batches = everything(steps)
        metrics: dict[str, float] = {}
        if self.algorithm.compute_advantages_and_returns:
            scores_R = attach_advantages(batch, micro_batches, self.backend, self.algorithm)
            metrics["rollout/rewards"] = float(scores_R.mean())
        postprocess(self.algorithm, rollout_id, micro_batches)
        return metrics | self._means(micro_batches, len(steps))

    def _means(self, batches: list[PackedBatch], num_steps: int) -> dict[str, float]:
        shares: dict[str, list[Tensor]] = {}
        for batch in batches:
            for name, values_T in _reported(batch).items():
                masked_T = torch.where(batch.loss_mask != 0, values_T, 0.0)
                shares.setdefault(name, []).append(weighted_sum(batch.loss_weights, masked_T) / batch.weight_total)
        if not shares:
            return {}
        sums = torch.stack([torch.stack(share).sum() for share in shares.values()])
        means = self.backend.sum_over_data_ranks(sums) / num_steps
        return {f"rollout/{name}": mean for name, mean in zip(shares, means.tolist(), strict=True)}

    def _step(self, rollout_id: int, index: int, batch: TrainBatch, step: list[PackedBatch]) -> StepMetrics:
        result = self.backend.train_step(step, loss_for(self.algorithm), wants=wants_of(self.algorithm))
        if result.overflowed:
            logger.info("rollout %d step %d skipped: loss scale %g is too large", rollout_id, index, result.loss_scale)
        elif result.skipped:
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


def _with_values(steps: Steps, batch: TrainBatch) -> Steps:
    """The critic's values, which came after the micro-batches were made."""
    if batch.values is not None:
        values, ends = torch.tensor(batch.values), np.cumsum(batch.response_lengths)
        for micro_batch in everything(steps):
            parts = [values[ends[row] - batch.response_lengths[row] : ends[row]] for row in micro_batch.rows]
            micro_batch.values = torch.cat(parts) if parts else torch.zeros_like(micro_batch.loss_mask)
    return steps


def _use_rollout_log_probs(batches: Sequence[PackedBatch]) -> None:
    for micro_batch in batches:
        if micro_batch.rollout_log_probs is None:
            raise ValueError("--use-rollout-logprobs: the rollout function returned samples without rollout_log_probs")
        micro_batch.old_log_probs = micro_batch.rollout_log_probs


def _reported(batch: PackedBatch) -> dict[str, Tensor]:
    """`rollout/NAME` -> [T], of what there is."""
    values = {
        "log_probs": batch.old_log_probs,
        "ref_log_probs": batch.ref_log_probs,
        "teacher_log_probs": batch.teacher_log_probs,
        "rollout_log_probs": batch.rollout_log_probs,
        "entropy": batch.entropy,
        "values": batch.values,
        "advantages": batch.advantages,
        "returns": batch.returns,
    }
    return {name: values_T for name, values_T in values.items() if values_T is not None}


def _policy_metrics(results: list[StepMetrics], known: dict[str, float]) -> dict[str, float]:
    """`rollout/log_probs` and `rollout/entropy` as the first step found them, where nobody computed them before."""
    names = {"rollout/log_probs": "log_probs", "rollout/entropy": "entropy_loss"}
    first = results[0].metrics
    return {key: first[name] for key, name in names.items() if key not in known and name in first}


def mean_over_steps(results: list[StepMetrics]) -> dict[str, float]:
    """`train/*`: metrics of the steps that were taken, averaged."""
    taken = [result for result in results if not result.skipped]
    names = [name for name in taken[0].metrics if name != "log_probs"] if taken else []
    metrics = {f"train/{name}": sum(r.metrics[name] for r in taken) / len(taken) for name in names}
    metrics["train/grad_norm"] = sum(r.grad_norm for r in taken) / len(taken) if taken else math.nan
    metrics["train/lr-pg_0"] = results[-1].lr
    metrics["train/skipped_steps"] = sum(result.skipped and not result.overflowed for result in results)
    if results[-1].loss_scale is not None:
        metrics["train/loss_scale"] = results[-1].loss_scale
        metrics["train/overflowed_steps"] = sum(result.overflowed for result in results)
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
