"""The losses of one micro-batch, as share of a step. Shapes: T response tokens, S sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from slime.algorithms.importance import mismatch_metrics
from slime.algorithms.kl import kl_estimate, unbiased_kl
from slime.algorithms.reduce import SequenceSum
from slime.algorithms.sequences import Sequences
from slime.algorithms.value import clipped_value_loss
from slime.config import AlgorithmConfig
from slime.data.packed import PackedBatch
from slime.training.backend import LossFn, LossOutput, TokenOutputs, Wants
from slime.training.correction import corrected
from slime.training.estimators import Surrogate, estimator_of
from slime.training.hooks import sample_lists
from slime.utils.misc import load_function


def policy_loss(
    outputs: TokenOutputs, batch: PackedBatch, sequence_sum: SequenceSum, *, cfg: AlgorithmConfig
) -> LossOutput:
    """The estimator's surrogate, corrected and reduced, minus entropy bonus, plus KL to the reference.

    Without old log-probs the policy has not moved since sampling: they are the current ones, detached.
    """
    assert batch.advantages is not None
    sequences = Sequences(batch.loss_mask, batch.sequence_ids, sequence_sum)
    log_probs_T = sequences.trained(outputs.log_probs)
    old_T = log_probs_T.detach() if batch.old_log_probs is None else sequences.trained(batch.old_log_probs)
    inputs = Surrogate(log_probs_T, old_T, sequences.trained(batch.advantages), sequences)
    clipped = estimator_of(cfg).surrogate(inputs, cfg)
    corrected_T, per_token = corrected(clipped.loss_T, inputs, batch, cfg)
    loss = pg_loss = _reduced(corrected_T, batch, cfg)
    per_token |= {
        "pg_clipfrac": clipped.clipped_T.float(),
        "ppo_kl": old_T - log_probs_T,
        "ois": torch.exp(log_probs_T - old_T),
        "log_probs": old_T,
    }
    if outputs.entropy is not None:
        entropy_T = sequences.trained(outputs.entropy)
        per_token["entropy_loss"] = entropy_T
        loss = loss - cfg.entropy_coef * weighted_sum(batch.loss_weights, entropy_T) if cfg.entropy_coef else loss
    if cfg.use_kl_loss and batch.ref_log_probs is not None:
        kl_T = kl_estimate(log_probs_T, sequences.trained(batch.ref_log_probs), cfg.kl_loss_type)
        kl_T = unbiased_kl(kl_T, log_probs_T, old_log_probs_T=old_T) if cfg.use_unbiased_kl else kl_T
        per_token["kl_loss"] = kl_T
        loss = loss + cfg.kl_loss_coef * weighted_sum(batch.loss_weights, kl_T) if cfg.kl_loss_coef else loss
    if batch.rollout_log_probs is not None:
        trainer_T = log_probs_T.detach() if cfg.use_rollout_logprobs else old_T
        per_token |= _mismatch(trainer_T, sequences.trained(batch.rollout_log_probs), cfg)
    metrics = {name: _mean(batch, values_T) for name, values_T in per_token.items()}
    return LossOutput(loss, {"pg_loss": pg_loss.detach()} | metrics)


def _mismatch(trainer_T: Tensor, rollout_T: Tensor, cfg: AlgorithmConfig) -> dict[str, Tensor]:
    """[T] each: how far the trainer's log-probs are from the engine's."""
    difference = {"train_rollout_logprob_abs_diff": (trainer_T - rollout_T).abs()}
    return difference | (mismatch_metrics(trainer_T, rollout_T) if cfg.get_mismatch_metrics else {})


def _reduced(loss_T: Tensor, batch: PackedBatch, cfg: AlgorithmConfig) -> Tensor:
    """This micro-batch's share of the policy loss: by weights, or by --custom-pg-loss-reducer-function-path."""
    path = cfg.custom_pg_loss_reducer_function_path
    if path is None:
        return weighted_sum(batch.loss_weights, loss_T)
    lists = sample_lists(batch)
    lengths = (lists["total_lengths"], lists["response_lengths"])
    reducer = load_function(path)(*lengths, lists["loss_masks"], cfg.calculate_per_token_loss)
    reduced: Tensor = reducer(loss_T) / batch.step_total
    return reduced


def value_loss(
    outputs: TokenOutputs, batch: PackedBatch, sequence_sum: SequenceSum, *, cfg: AlgorithmConfig
) -> LossOutput:
    """The critic's clipped squared error."""
    assert outputs.values is not None
    assert batch.values is not None
    assert batch.returns is not None
    trained = Sequences(batch.loss_mask, batch.sequence_ids, sequence_sum).trained
    clipped = clipped_value_loss(
        trained(outputs.values), trained(batch.values), returns_T=trained(batch.returns), value_clip=cfg.value_clip
    )
    loss = weighted_sum(batch.loss_weights, clipped.loss_T)
    return LossOutput(loss, {"value_clipfrac": _mean(batch, clipped.clipped_T.float())})


def sft_loss(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: SequenceSum) -> LossOutput:
    """Negative log-likelihood of the trained tokens."""
    trained = Sequences(batch.loss_mask, batch.sequence_ids, sequence_sum).trained
    return LossOutput(weighted_sum(batch.loss_weights, -trained(outputs.log_probs)), {})


def custom_loss(
    outputs: TokenOutputs, batch: PackedBatch, sequence_sum: SequenceSum, *, cfg: AlgorithmConfig
) -> LossOutput:
    """--custom-loss-function-path: f(args, batch, logits, sum_of_sample_mean) -> (loss, metrics), sums over samples.

    batch: `hooks.sample_lists`. logits: [T, V] float32, what predicts each response token, temperature applied.
    sum_of_sample_mean: [T] -> the sum over this micro-batch's samples of the mean over their trained tokens.
    """
    assert cfg.custom_loss_function_path is not None
    trained = Sequences(batch.loss_mask, batch.sequence_ids, sequence_sum).trained

    def sum_of_sample_mean(values_T: Tensor) -> Tensor:
        return weighted_sum(batch.loss_weights, trained(values_T)) * batch.step_total

    function = load_function(cfg.custom_loss_function_path)
    loss, metrics = function(cfg, sample_lists(batch), outputs.logits, sum_of_sample_mean)
    as_share = {name: torch.as_tensor(value).detach() / batch.step_total for name, value in metrics.items()}
    return LossOutput(loss / batch.step_total, as_share)


def loss_for(cfg: AlgorithmConfig) -> LossFn:
    """The loss that `--loss-type` names."""
    losses: dict[str, Callable[..., LossOutput]] = {
        "policy_loss": partial(policy_loss, cfg=cfg),
        "sft_loss": sft_loss,
        "custom_loss": partial(custom_loss, cfg=cfg),
    }
    return losses[cfg.loss_type]


def wants_of(cfg: AlgorithmConfig) -> Wants:
    """What that loss reads besides log-probs."""
    return Wants(entropy=cfg.loss_type == "policy_loss", logits=cfg.loss_type == "custom_loss")


def weighted_sum(weights_T: Tensor, values_T: Tensor) -> Tensor:
    """This micro-batch's share of the step's loss: scalar from two [T]."""
    return (weights_T * values_T).sum()


def _mean(batch: PackedBatch, values_T: Tensor) -> Tensor:
    """This micro-batch's share of the step's mean, whatever the weights of the loss add up to. Without gradient."""
    return weighted_sum(batch.loss_weights, values_T.detach()) / batch.weight_total
