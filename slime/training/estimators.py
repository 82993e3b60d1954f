"""How rewards become advantages and which surrogate is optimised: one entry an algorithm.

To add one: its maths as a file in `slime/algorithms`, an entry in `ESTIMATORS`, its name and flags in
`slime/config/algorithm.py`. Outside the package an `Estimator` is named by its dotted path instead.

Shapes: S sequences, T response tokens of one micro-batch, complete sequences end to end; R samples of the rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slime.algorithms import cispo, distill, dr_grpo, gae, grpo, gspo, ppo, reduce, reinforce_plus_plus, rloo
from slime.algorithms.gae import Discount, Estimate
from slime.algorithms.groups import centered
from slime.algorithms.ppo import ClippedLoss
from slime.algorithms.sequences import Sequences
from slime.algorithms.shaping import token_rewards
from slime.config import AlgorithmConfig
from slime.utils.misc import load_function


@dataclass(frozen=True)
class Evidence:
    """What is known of a micro-batch's sequences before their advantages."""

    scores_S: Tensor  # [S] of `Estimator.scores`
    kl_T: Tensor  # [T] estimate of KL(policy || reference); 0 without --kl-coef
    mask_T: Tensor  # [T] of 0 and 1
    sequence_ids_T: Tensor  # int64 [T] in [0, S)
    old_log_probs_T: Tensor | None = None
    values_T: Tensor | None = None  # of the critic
    teacher_log_probs_T: Tensor | None = None

    def spread(self) -> Tensor:
        """[T] the score of its sequence at each trained token, 0 at masked ones."""
        return torch.where(self.mask_T != 0, self.scores_S[self.sequence_ids_T], 0.0)

    def token_rewards(self, kl_coef: float) -> Tensor:
        """[T] the KL penalty at each trained token, the score at the last."""
        return token_rewards(
            self.scores_S, self.kl_T, mask_T=self.mask_T, sequence_ids_T=self.sequence_ids_T, kl_coef=kl_coef
        )


@dataclass(frozen=True)
class Surrogate:
    """The inputs of a policy loss, 0 at masked tokens. Gradients flow through `log_probs_T`."""

    log_probs_T: Tensor
    old_log_probs_T: Tensor
    advantages_T: Tensor
    sequences: Sequences


def ppo_surrogate(inputs: Surrogate, cfg: AlgorithmConfig) -> ClippedLoss:
    """PPO's clip, token by token."""
    return _clip(inputs.log_probs_T - inputs.old_log_probs_T, inputs, cfg)


def _clip(log_ratio_T: Tensor, inputs: Surrogate, cfg: AlgorithmConfig) -> ClippedLoss:
    return ppo.clipped_surrogate(
        log_ratio_T, inputs.advantages_T, eps_low=cfg.eps_clip, eps_high=_eps_high(cfg), eps_clip_c=cfg.eps_clip_c
    )


def _gspo_surrogate(inputs: Surrogate, cfg: AlgorithmConfig) -> ClippedLoss:
    ratio_T = gspo.sequence_log_ratio(inputs.log_probs_T, inputs.old_log_probs_T, sequences=inputs.sequences)
    return _clip(ratio_T, inputs, cfg)


def _cispo_surrogate(inputs: Surrogate, cfg: AlgorithmConfig) -> ClippedLoss:
    return cispo.cispo_loss(
        inputs.log_probs_T,
        inputs.old_log_probs_T,
        advantages_T=inputs.advantages_T,
        eps_low=cfg.eps_clip,
        eps_high=_eps_high(cfg),
    )


def _eps_high(cfg: AlgorithmConfig) -> float:
    return cfg.eps_clip if cfg.eps_clip_high is None else cfg.eps_clip_high


def score_is_advantage(evidence: Evidence, cfg: AlgorithmConfig) -> Estimate:
    """Every trained token has the score of its sequence."""
    advantages_T = evidence.spread()
    return Estimate(advantages_T, advantages_T)


def mean_weights(mask_T: Tensor, rollout_T: Tensor, cfg: AlgorithmConfig) -> Tensor:
    """Mean over tokens with --calculate-per-token-loss, else over rollouts of the mean over their tokens."""
    if cfg.calculate_per_token_loss:
        return reduce.per_token_weights(mask_T)
    return reduce.per_sample_weights(mask_T, rollout_T, int(rollout_T.max()) + 1)


def _constant_weights(mask_T: Tensor, rollout_T: Tensor, cfg: AlgorithmConfig) -> Tensor:
    assert cfg.loss_length is not None
    return reduce.constant_weights(mask_T, int(rollout_T.max()) + 1, max_length=cfg.loss_length)


@dataclass(frozen=True)
class Estimator:
    """One algorithm.

    scores: (rewards [R], group ids [R], cfg) -> [R], what the group says of each sample.
    advantages: (Evidence, cfg) -> Estimate, token by token.
    surrogate: (Surrogate, cfg) -> ClippedLoss, the loss of each token.
    weights: (mask [T], rollout of each token [T], cfg) -> [T], the share of each token in the step's loss.
    has_token_kl: --kl-coef acts at each token in `advantages`; else its sum over a sample is taken off the reward.
    """

    scores: Callable[[Tensor, Tensor, AlgorithmConfig], Tensor]
    advantages: Callable[[Evidence, AlgorithmConfig], Estimate] = score_is_advantage
    surrogate: Callable[[Surrogate, AlgorithmConfig], ClippedLoss] = ppo_surrogate
    weights: Callable[[Tensor, Tensor, AlgorithmConfig], Tensor] = field(default=mean_weights)
    has_token_kl: bool = False


def _reward(rewards_R: Tensor, group_ids_R: Tensor, cfg: AlgorithmConfig) -> Tensor:
    return rewards_R


def _grpo_score(rewards_R: Tensor, group_ids_R: Tensor, cfg: AlgorithmConfig) -> Tensor:
    return grpo.advantages(rewards_R, group_ids_R, std_normalize=cfg.grpo_std_normalization)


def _dr_grpo_score(rewards_R: Tensor, group_ids_R: Tensor, cfg: AlgorithmConfig) -> Tensor:
    return dr_grpo.advantages(rewards_R, group_ids_R)


def _rloo_score(rewards_R: Tensor, group_ids_R: Tensor, cfg: AlgorithmConfig) -> Tensor:
    return rloo.advantages(rewards_R, group_ids_R)


def _centered_reward(rewards_R: Tensor, group_ids_R: Tensor, cfg: AlgorithmConfig) -> Tensor:
    return centered(rewards_R, group_ids_R)


def _discounted_return(evidence: Evidence, cfg: AlgorithmConfig) -> Estimate:
    returns_T = reinforce_plus_plus.returns(
        evidence.token_rewards(cfg.kl_coef), evidence.mask_T, sequence_ids_T=evidence.sequence_ids_T, gamma=cfg.gamma
    )
    return Estimate(returns_T, returns_T)


def _score_minus_kl(evidence: Evidence, cfg: AlgorithmConfig) -> Estimate:
    advantages_T = reinforce_plus_plus.baseline_advantages(
        evidence.scores_S,
        evidence.kl_T,
        mask_T=evidence.mask_T,
        sequence_ids_T=evidence.sequence_ids_T,
        kl_coef=cfg.kl_coef,
    )
    return Estimate(advantages_T, advantages_T)


def _gae(evidence: Evidence, cfg: AlgorithmConfig) -> Estimate:
    assert evidence.values_T is not None
    return gae.gae(
        evidence.token_rewards(cfg.kl_coef),
        evidence.values_T,
        mask_T=evidence.mask_T,
        sequence_ids_T=evidence.sequence_ids_T,
        discount=Discount(cfg.gamma, cfg.lambd),
    )


def _teacher_minus_student(evidence: Evidence, cfg: AlgorithmConfig) -> Estimate:
    assert evidence.old_log_probs_T is not None
    assert evidence.teacher_log_probs_T is not None
    advantages_T = distill.advantages(evidence.old_log_probs_T, evidence.teacher_log_probs_T)
    advantages_T = torch.where(evidence.mask_T != 0, advantages_T, 0.0)
    return Estimate(advantages_T, advantages_T)


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(_grpo_score),
    "gspo": Estimator(_grpo_score, surrogate=_gspo_surrogate),
    "cispo": Estimator(_grpo_score, surrogate=_cispo_surrogate),
    "rloo": Estimator(_rloo_score),
    "dr_grpo": Estimator(_dr_grpo_score, weights=_constant_weights),
    "reinforce_plus_plus": Estimator(_reward, _discounted_return, has_token_kl=True),
    "reinforce_plus_plus_baseline": Estimator(_centered_reward, _score_minus_kl, has_token_kl=True),
    "ppo": Estimator(_reward, _gae, has_token_kl=True),
    "on_policy_distillation": Estimator(_reward, _teacher_minus_student),
}


def estimator_of(cfg: AlgorithmConfig) -> Estimator:
    """What --advantage-estimator names. Raises ValueError for a path that is no Estimator."""
    name = cfg.advantage_estimator
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    estimator = load_function(name)
    if not isinstance(estimator, Estimator):
        raise ValueError(
            f"--advantage-estimator {name} must be a slime.training.estimators.Estimator, got {estimator!r:.60}"
        )
    return estimator
