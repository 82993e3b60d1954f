"""The losses of one micro-batch, as share of a step. Shapes: T response tokens, S sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from slime.algorithms.kl import kl_estimate
from slime.algorithms.ppo import clipped_policy_loss
from slime.algorithms.reduce import SequenceSum
from slime.config import AlgorithmConfig
from slime.data.packed import PackedBatch
from slime.training.backend import LossFn, LossOutput, TokenOutputs


def policy_loss(
    outputs: TokenOutputs, batch: PackedBatch, sequence_sum: SequenceSum, *, cfg: AlgorithmConfig
) -> LossOutput:
    """Clipped policy gradient, minus entropy bonus, plus KL to the reference.

    Without old log-probs the policy has not moved since sampling: they are the current ones, detached.
    """
    assert batch.advantages is not None
    assert cfg.eps_clip_high is not None
    trained = partial(_trained, batch)
    log_probs_T = trained(outputs.log_probs)
    old_T = log_probs_T.detach() if batch.old_log_probs is None else trained(batch.old_log_probs)
    clipped = clipped_policy_loss(
        log_probs_T, old_T, advantages_T=trained(batch.advantages), eps_low=cfg.eps_clip, eps_high=cfg.eps_clip_high
    )
    mean = partial(weighted_sum, batch.loss_weights)
    loss = pg_loss = mean(clipped.loss_T)
    metrics = {
        "pg_loss": pg_loss,
        "pg_clipfrac": mean(clipped.clipped_T.float()),
        "ppo_kl": mean(old_T - log_probs_T),
    }
    if outputs.entropy is not None:
        entropy = mean(trained(outputs.entropy))
        loss = loss - cfg.entropy_coef * entropy if cfg.entropy_coef else loss
        metrics["entropy_loss"] = entropy
    if batch.ref_log_probs is not None:
        kl_loss = mean(kl_estimate(log_probs_T, trained(batch.ref_log_probs), cfg.kl_loss_type))
        loss = loss + cfg.kl_loss_coef * kl_loss if cfg.kl_loss_coef else loss
        metrics["kl_loss"] = kl_loss
    if batch.rollout_log_probs is not None:
        trainer_T = log_probs_T.detach() if cfg.use_rollout_logprobs else old_T
        metrics["train_rollout_logprob_abs_diff"] = mean((trainer_T - trained(batch.rollout_log_probs)).abs())
    return LossOutput(loss, _detached(metrics))


def sft_loss(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: SequenceSum) -> LossOutput:
    """Negative log-likelihood of the trained tokens."""
    loss = weighted_sum(batch.loss_weights, -_trained(batch, outputs.log_probs))
    return LossOutput(loss, {})


def loss_for(cfg: AlgorithmConfig) -> LossFn:
    """The loss that `--loss-type` names."""
    losses: dict[str, Callable[..., LossOutput]] = {"policy_loss": partial(policy_loss, cfg=cfg), "sft_loss": sft_loss}
    return losses[cfg.loss_type]


def _trained(batch: PackedBatch, values_T: Tensor) -> Tensor:
    """`values_T`, but 0 at masked tokens: whatever stood there cannot become NaN later on, nor in the gradient."""
    return torch.where(batch.loss_weights != 0, values_T, 0.0)


def weighted_sum(weights_T: Tensor, values_T: Tensor) -> Tensor:
    """This micro-batch's share of the step's mean: scalar from two [T]."""
    return (weights_T * values_T).sum()


def _detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in metrics.items()}
