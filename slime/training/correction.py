"""Corrections of the policy loss for samples of another policy. Shapes: T response tokens of one micro-batch."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slime.algorithms import importance, opsm
from slime.algorithms.importance import MISOptions
from slime.config import AlgorithmConfig
from slime.data.packed import PackedBatch
from slime.training.estimators import Surrogate
from slime.training.hooks import joined, lengths_of
from slime.utils.misc import load_function


class Corrected(NamedTuple):
    """loss_T: [T]. metrics: [T] each, to be averaged with the weights of the loss."""

    loss_T: Tensor
    metrics: dict[str, Tensor]


def corrected(loss_T: Tensor, inputs: Surrogate, batch: PackedBatch, cfg: AlgorithmConfig) -> Corrected:
    """`loss_T` after off-policy sequence masking and importance weights, as far as they are switched on."""
    metrics: dict[str, Tensor] = {}
    if cfg.use_opsm:
        keep_T = opsm.keep_mask(
            inputs.log_probs_T,
            inputs.old_log_probs_T,
            advantages_T=inputs.advantages_T,
            sequences=inputs.sequences,
            delta=cfg.opsm_delta,
        )
        loss_T, metrics["opsm_clipfrac"] = loss_T * keep_T, 1 - keep_T
    if not cfg.use_tis:
        return Corrected(loss_T, metrics)
    if batch.rollout_log_probs is None:
        raise ValueError("--use-tis: the rollout function returned samples without rollout_log_probs")
    if cfg.custom_tis_function_path is not None:
        result = _custom(loss_T, inputs, batch, cfg)
        return Corrected(result.loss_T, metrics | result.metrics)
    correction = importance.mis(
        inputs.old_log_probs_T, batch.rollout_log_probs, sequences=inputs.sequences, options=_options(cfg)
    )
    return Corrected(loss_T * correction.weights_T, metrics | correction.metrics)


def _options(cfg: AlgorithmConfig) -> MISOptions:
    return MISOptions(
        level=cfg.tis_level,
        mode=cfg.tis_mode,
        low=cfg.tis_clip_low,
        high=cfg.tis_clip,
        rs_level=cfg.tis_rs_level,
        rs_low=cfg.tis_rs_low,
        rs_high=cfg.tis_rs_high,
        veto=cfg.tis_veto,
    )


@cache
def _function(path: str) -> Any:
    return load_function(path)


def _custom(loss_T: Tensor, inputs: Surrogate, batch: PackedBatch, cfg: AlgorithmConfig) -> Corrected:
    """--custom-tis-function-path: returns (pg_loss [T], masks, one a sample, {name: [T]})."""
    path = cfg.custom_tis_function_path
    assert path is not None
    assert batch.rollout_log_probs is not None
    lengths = lengths_of(batch)
    pg_loss, masks, metrics = _function(path)(
        cfg,
        pg_loss=loss_T,
        train_log_probs=list(torch.split(inputs.old_log_probs_T, lengths)),
        rollout_log_probs=list(torch.split(inputs.sequences.trained(batch.rollout_log_probs), lengths)),
        loss_masks=list(torch.split(batch.loss_mask, lengths)),
        total_lengths=list(batch.sequence_lengths),
        response_lengths=lengths,
    )
    pg_loss = joined([pg_loss], loss_T, what=f"--custom-tis-function-path {path}: pg_loss")
    keep_T = joined(masks, loss_T, what=f"--custom-tis-function-path {path}: the masks")
    checked = {
        name: joined([value], loss_T, what=f"--custom-tis-function-path {path}: metric {name!r}").detach()
        for name, value in metrics.items()
    }
    return Corrected(torch.where(keep_T != 0, pg_loss * keep_T, 0.0), checked)
