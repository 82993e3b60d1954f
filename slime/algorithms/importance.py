"""Corrections for a policy that was sampled by an engine whose numbers differ from the trainer's. Shapes: T tokens.

The ratio is that of the trainer's old policy to the engine's, exp(old - rollout), not PPO's of new to old: the loss is
multiplied with a bounded form of it. TIS (fengyao.notion.site/off-policy-rl) truncates it; IcePop (arXiv:2510.18855)
drops tokens outside an interval; MIS (yingru.notion.site, "When Speed Kills Stability") does either, at the level of
a token or a sequence, and rejects what is too far off. Denominators of the loss stay those of the original mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slime.algorithms.ppo import MAX_LOG_RATIO
from slime.algorithms.sequences import Sequences

Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "clip", "mask"]


class Correction(NamedTuple):
    """Multiply the loss with `weights_T`, which is 0 where rejected. Nothing here carries a gradient.

    keep_T: [T] of 0 and 1, 0 where rejected. metrics: [T] each, to be averaged with the weights of the loss.
    """

    weights_T: Tensor
    keep_T: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class MISOptions:
    """How ratios are taken, bounded and rejected.

    level: token; sequence: product over its trained tokens (unbiased, of high variance); geometric: their geometric
    mean (length does not matter; bounds are then near 1, such as 0.999 and 1.001).
    mode: truncate at `high`; clip to [low, high]; mask: 0 outside it.
    rs_level: reject where the ratio at that level leaves [rs_low, rs_high]; None: none.
    veto: reject a sequence that has a token of a ratio below this; None: none.
    """

    level: Level = "token"
    mode: Mode = "truncate"
    low: float = 0.5
    high: float = 2.0
    rs_level: Level | None = None
    rs_low: float = 0.5
    rs_high: float = 2.0
    veto: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("low and high", self.low, self.high),
            ("rs_low and rs_high", self.rs_low, self.rs_high),
        ):
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be an interval of ratios, 0 <= low <= high, got [{low}, {high}]")
        if self.veto is not None and not 0 < self.veto < 1:
            raise ValueError(f"veto must be a ratio between 0 and 1, got {self.veto}")


def tis(old_log_probs_T: Tensor, rollout_log_probs_T: Tensor, *, low: float, high: float) -> Correction:
    """Truncated importance sampling: the token's ratio clamped to [low, high]."""
    ratio_T = _ratio(old_log_probs_T - rollout_log_probs_T)
    return _correction(ratio_T, ratio_T.clamp(low, high), torch.ones_like(ratio_T))


def icepop(old_log_probs_T: Tensor, rollout_log_probs_T: Tensor, *, low: float, high: float) -> Correction:
    """The token's ratio inside [low, high], 0 outside."""
    ratio_T = _ratio(old_log_probs_T - rollout_log_probs_T)
    return _correction(ratio_T, ratio_T, _inside(ratio_T, low, high))


def mis(
    old_log_probs_T: Tensor, rollout_log_probs_T: Tensor, *, sequences: Sequences, options: MISOptions
) -> Correction:
    """Ratios at a level, bounded by a mode, after rejection and veto. Weights and keep_T are 0 at masked tokens."""
    difference_T = sequences.trained(old_log_probs_T.detach()) - sequences.trained(rollout_log_probs_T)
    ratio_T = _ratio(_at_level(difference_T, sequences, options.level))
    keep_T = sequences.trained(torch.ones_like(ratio_T))
    metrics: dict[str, Tensor] = {}
    if options.mode == "mask":
        keep_T = keep_T * _inside(ratio_T, options.low, options.high)
    if options.rs_level is not None:
        rs_ratio_T = _ratio(_at_level(difference_T, sequences, options.rs_level))
        kept_T = _inside(rs_ratio_T, options.rs_low, options.rs_high)
        keep_T, metrics["mis_rs_fraction"] = keep_T * kept_T, 1 - kept_T
    if options.veto is not None:
        is_vetoed_T = sequences.total((difference_T < math.log(options.veto)).to(ratio_T.dtype)) > 0
        keep_T, metrics["mis_veto_fraction"] = keep_T * ~is_vetoed_T, is_vetoed_T.to(ratio_T.dtype)
    bounded_T = {
        "truncate": ratio_T.clamp(max=options.high),
        "clip": ratio_T.clamp(options.low, options.high),
        "mask": ratio_T,
    }[options.mode]
    correction = _correction(ratio_T, bounded_T, keep_T)
    return correction._replace(metrics=correction.metrics | metrics)


def mismatch_metrics(old_log_probs_T: Tensor, rollout_log_probs_T: Tensor) -> dict[str, Tensor]:
    """[T] each, how far the trainer is from the engine, to be averaged with the weights of the loss.

    With r = exp(old - rollout), sampled from the engine: kl and k3_kl estimate KL(engine || trainer) (k1 and k3; a
    sequence's mean of the first is the log of its perplexity under the trainer over that under the engine);
    chi2 = r^2 - 1 estimates the chi-squared divergence, the excess variance of an unbounded correction.
    """
    difference_T = (old_log_probs_T - rollout_log_probs_T).detach()
    ratio_T = _ratio(difference_T)
    bounded_T = difference_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "mismatch_kl": -difference_T,
        "mismatch_k3_kl": torch.expm1(bounded_T) - bounded_T,
        "mismatch_abs_diff": difference_T.abs(),
        "mismatch_ratio": ratio_T,
        "mismatch_chi2": ratio_T.square() - 1,
    }


def _ratio(log_ratio_T: Tensor) -> Tensor:
    return torch.exp(log_ratio_T.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def _inside(ratio_T: Tensor, low: float, high: float) -> Tensor:
    return ((ratio_T >= low) & (ratio_T <= high)).to(ratio_T.dtype)


def _at_level(log_ratio_T: Tensor, sequences: Sequences, level: Level) -> Tensor:
    if level == "token":
        return log_ratio_T
    return sequences.total(log_ratio_T) if level == "sequence" else sequences.mean(log_ratio_T)


def _correction(ratio_T: Tensor, bounded_T: Tensor, keep_T: Tensor) -> Correction:
    weights_T = bounded_T * keep_T
    metrics = {"tis": ratio_T, "tis_abs": (ratio_T - 1).abs(), "tis_clipfrac": (weights_T != ratio_T).to(ratio_T.dtype)}
    return Correction(weights_T, keep_T, metrics)
