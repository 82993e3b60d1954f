"""Log-probs and entropy of target tokens from hidden states; logits exist for one chunk at a time, in both directions.

Shapes: T tokens, C of them in a chunk, V vocabulary, E model width. In the backward logits are computed again and
turned into their gradient in place: two float32 [C, V] at most are held (three for the gradient of the entropy, where
the loss has one), whatever T is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class LogitRule(NamedTuple):
    """How logits follow from what the head gives: capped (softcap * tanh(x / softcap)), then over the temperature.

    chunk_size: tokens whose logits are held at once.
    """

    temperature: float
    softcap: float | None
    chunk_size: int


class VocabShard(NamedTuple):
    """The rows of a head that this rank holds, from token `start` on; the ranks of `group` hold all."""

    start: int
    group: dist.ProcessGroup


def target_log_probs(
    hidden_TE: Tensor, head: nn.Linear, targets_T: Tensor, rule: LogitRule, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """float32 [T] log-probs of the targets, and entropy [T] where it is wanted."""
    log_probs_T, entropy_T = _TargetLogProbs.apply(hidden_TE, head.weight, head.bias, targets_T, rule, entropy, None)
    return log_probs_T, entropy_T if entropy else None


def sharded_target_log_probs(
    hidden_TE: Tensor, weight_VE: Tensor, targets_T: Tensor, rule: LogitRule, *, entropy: bool, shard: VocabShard | None
) -> tuple[Tensor, Tensor | None]:
    """The same, complete on every rank of the shard's group, from its rows of the head; None: these are all rows.

    The gradient of `hidden_TE` is this rank's share: the ranks' shares add up to it.
    """
    log_probs_T, entropy_T = _TargetLogProbs.apply(hidden_TE, weight_VE, None, targets_T, rule, entropy, shard)
    return log_probs_T, entropy_T if entropy else None


def chunk_logits(hidden_CE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, rule: LogitRule) -> Tensor:
    """float32 [C, V]; products of half precision are not rounded to it."""
    if hidden_CE.is_cuda and hidden_CE.dtype != torch.float32:
        logits_CV = torch.mm(hidden_CE, weight_VE.t(), out_dtype=torch.float32)
    else:
        logits_CV = torch.mm(hidden_CE.float(), weight_VE.t().float())
    if bias_V is not None:
        logits_CV.add_(bias_V)
    if rule.softcap is not None:
        logits_CV.div_(rule.softcap).tanh_().mul_(rule.softcap)
    return logits_CV if rule.temperature == 1.0 else logits_CV.div_(rule.temperature)


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        rule: LogitRule,
        entropy: bool,
        shard: VocabShard | None,
    ) -> tuple[Tensor, Tensor]:
        picked_T, normaliser_T, entropy_T = (hidden_TE.new_zeros(len(targets_T), dtype=torch.float32) for _ in "123")
        rows_T, is_here_T = _rows(targets_T, len(weight_VE), shard)
        for part in _parts(len(targets_T), rule.chunk_size):
            logits_CV = chunk_logits(hidden_TE[part], weight_VE, bias_V, rule)
            picked_T[part] = logits_CV.gather(-1, rows_T[part, None])[:, 0]
            largest_C = logits_CV.amax(-1)
            logits_CV.sub_(largest_C[:, None])
            weights_CV = logits_CV.exp() if entropy else logits_CV.exp_()
            total_C = weights_CV.sum(-1)
            if entropy:
                entropy_T[part] = total_C.log() - weights_CV.mul_(logits_CV).sum(-1) / total_C
            normaliser_T[part] = largest_C + total_C.log()
        if shard is not None and is_here_T is not None:
            own = torch.stack([picked_T * is_here_T, normaliser_T, entropy_T])
            picked_T, normaliser_T, entropy_T = _over_shards(own, shard.group)
        ctx.save_for_backward(hidden_TE, weight_VE, bias_V, rows_T, is_here_T, normaliser_T, entropy_T)
        ctx.rule = rule
        ctx.set_materialize_grads(False)  # an entropy that is only looked at has none
        return picked_T - normaliser_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TE, weight_VE, bias_V, rows_T, is_here_T, normaliser_T, entropy_T = ctx.saved_tensors
        log_probs_grad_T, entropy_grad_T = gradients
        if log_probs_grad_T is None:
            log_probs_grad_T = torch.zeros_like(normaliser_T)
        needs = ctx.needs_input_grad
        hidden_grad = torch.empty_like(hidden_TE) if needs[0] else None
        weight_grad = torch.zeros_like(weight_VE) if needs[1] else None
        bias_grad = torch.zeros_like(bias_V) if needs[2] and bias_V is not None else None
        for part in _parts(len(rows_T), ctx.rule.chunk_size):
            logits_CV = chunk_logits(hidden_TE[part], weight_VE, bias_V, ctx.rule)
            slope_CV = _softcap_slope(logits_CV, ctx.rule)
            log_probs_CV = logits_CV.sub_(normaliser_T[part, None])
            grad_C = log_probs_grad_T[part, None]
            if entropy_grad_T is not None:
                grad_CV = log_probs_CV.exp()
                grad_CV *= log_probs_CV.add_(entropy_T[part, None]).mul_(-entropy_grad_T[part, None]).sub_(grad_C)
            else:
                grad_CV = log_probs_CV.exp_().mul_(-grad_C)
            own_grad_C = grad_C if is_here_T is None else grad_C * is_here_T[part, None]
            grad_CV.scatter_add_(-1, rows_T[part, None], own_grad_C)
            if slope_CV is not None:
                grad_CV *= slope_CV
            if ctx.rule.temperature != 1.0:
                grad_CV /= ctx.rule.temperature
            rounded_CV = grad_CV.to(weight_VE.dtype)
            if hidden_grad is not None:
                torch.mm(rounded_CV, weight_VE, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad.addmm_(rounded_CV.t(), hidden_TE[part])
            if bias_grad is not None:
                bias_grad += grad_CV.sum(0)
        return hidden_grad, weight_grad, bias_grad, None, None, None, None


def _rows(targets_T: Tensor, num_rows: int, shard: VocabShard | None) -> tuple[Tensor, Tensor | None]:
    """[T] the row of each target, any where it is another rank's, and float32 [T] whether it is here."""
    if shard is None:
        return targets_T, None
    rows_T = targets_T - shard.start
    return rows_T.clamp(0, num_rows - 1), ((rows_T >= 0) & (rows_T < num_rows)).float()


def _over_shards(own: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """[T] each of all rows: the target's logit, log of the sum of exponentials, entropy. own: [3, T] of this rank's."""
    shares = own.new_empty(dist.get_world_size(group), *own.shape)
    dist.all_gather(list(shares.unbind()), own, group=group)
    picked_RT, normaliser_RT, entropy_RT = shares.unbind(1)
    normaliser_T = normaliser_RT.logsumexp(0)
    mean_logit_T = ((normaliser_RT - normaliser_T).exp() * (normaliser_RT - entropy_RT)).sum(0)
    return picked_RT.sum(0), normaliser_T, normaliser_T - mean_logit_T


def _softcap_slope(logits_CV: Tensor, rule: LogitRule) -> Tensor | None:
    """The derivative of capped logits by what was capped, 1 - tanh^2; None where nothing is."""
    if rule.softcap is None:
        return None
    return (logits_CV * (rule.temperature / rule.softcap)).square_().neg_().add_(1)


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))
