"""From rewards to advantages and returns. Shapes: R samples of the rollout, T response tokens of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slime.algorithms import distill, whiten
from slime.algorithms.gae import Estimate
from slime.config import AlgorithmConfig
from slime.data.batch import TrainBatch
from slime.data.packed import PackedBatch
from slime.training.backend import TrainBackend
from slime.training.estimators import Estimator, Evidence, estimator_of
from slime.training.hooks import joined, sample_lists
from slime.utils.misc import load_function


def attach_advantages(
    batch: TrainBatch, batches: Sequence[PackedBatch], backend: TrainBackend, cfg: AlgorithmConfig
) -> Tensor:
    """Fill in `advantages` and `returns` of this rank's micro-batches of the rollout `batch`. Collective.

    Returns [R]: the score of each sample, the same on every rank.
    """
    estimator = estimator_of(cfg)
    scores_R = _scores(batch, batches, backend, cfg=cfg, estimator=estimator)
    for micro_batch in batches:
        scores_S = scores_R[torch.tensor(micro_batch.rows or [0])].to(micro_batch.loss_mask.device)
        _set_estimate(micro_batch, scores_S, estimator, cfg)
    if cfg.normalize_advantages:
        _whiten(batches, backend)
    return scores_R


def _scores(
    batch: TrainBatch,
    batches: Sequence[PackedBatch],
    backend: TrainBackend,
    *,
    cfg: AlgorithmConfig,
    estimator: Estimator,
) -> Tensor:
    """[R] on the CPU, the same on every rank."""
    rewards_R = torch.tensor(batch.rewards)
    if cfg.kl_coef > 0 and not estimator.has_token_kl:
        rewards_R = rewards_R - cfg.kl_coef * _kl_of_samples(len(batch), batches, backend)
    if batch.rewards_are_final or not cfg.rewards_normalization:
        return rewards_R
    return estimator.scores(rewards_R, torch.tensor(batch.group_ids), cfg)


def _kl_of_samples(num_samples: int, batches: Sequence[PackedBatch], backend: TrainBackend) -> Tensor:
    """[R] KL to the reference, summed over each sample's trained tokens and known to every rank."""
    kl_R = torch.zeros(num_samples)
    for micro_batch in batches:
        if micro_batch.rows:
            assert micro_batch.kl is not None
            rows_T = torch.tensor(micro_batch.rows)[micro_batch.sequence_ids.cpu()]
            kl_R.index_add_(0, rows_T, torch.where(micro_batch.loss_mask != 0, micro_batch.kl, 0.0).cpu())
    return backend.sum_over_data_ranks(kl_R)


def _set_estimate(batch: PackedBatch, scores_S: Tensor, estimator: Estimator, cfg: AlgorithmConfig) -> None:
    if cfg.custom_advantage_function_path is not None:
        estimate = _custom(batch, scores_S, cfg, cfg.custom_advantage_function_path)
    else:
        evidence = Evidence(
            scores_S,
            kl_T=torch.zeros_like(batch.loss_mask) if batch.kl is None else batch.kl,
            mask_T=batch.loss_mask,
            sequence_ids_T=batch.sequence_ids,
            old_log_probs_T=batch.old_log_probs,
            values_T=batch.values,
            teacher_log_probs_T=batch.teacher_log_probs,
        )
        estimate = estimator.advantages(evidence, cfg)
    batch.advantages, batch.returns = estimate
    if cfg.use_opd:
        assert batch.old_log_probs is not None
        assert batch.teacher_log_probs is not None
        penalised = distill.with_teacher(
            batch.advantages, batch.old_log_probs, teacher_log_probs_T=batch.teacher_log_probs, coef=cfg.opd_kl_coef
        )
        batch.advantages = torch.where(batch.loss_mask != 0, penalised, 0.0)


def _custom(batch: PackedBatch, scores_S: Tensor, cfg: AlgorithmConfig, path: str) -> Estimate:
    """--custom-advantage-function-path sets `advantages` and `returns`, lists of one tensor a sample."""
    data = sample_lists(batch) | {"rewards": scores_S.tolist()}
    load_function(path)(cfg, data)
    missing = [name for name in ("advantages", "returns") if data.get(name) is None]
    if missing:
        raise ValueError(f"--custom-advantage-function-path {path} did not set rollout_data[{missing[0]!r}]")
    what = f"--custom-advantage-function-path {path}: rollout_data"
    return Estimate(
        joined(data["advantages"], batch.loss_mask, what=f"{what}['advantages']"),
        joined(data["returns"], batch.loss_mask, what=f"{what}['returns']"),
    )


def _whiten(batches: Sequence[PackedBatch], backend: TrainBackend) -> None:
    """Mean 0 and variance 1 over the trained tokens of the whole rollout, on all ranks."""
    shares = [whiten.moments(batch.advantages, batch.loss_mask) for batch in batches if batch.advantages is not None]
    total = backend.sum_over_data_ranks(torch.stack(shares).sum(0))
    for batch in batches:
        assert batch.advantages is not None
        batch.advantages = whiten.whiten(batch.advantages, batch.loss_mask, moments=total.to(batch.advantages.device))
