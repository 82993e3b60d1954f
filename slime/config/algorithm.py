"""What is optimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.base import ConfigError, Group, arg, check, check_not_negative, check_positive, flag_of

ESTIMATORS = (
    "grpo",
    "gspo",
    "cispo",
    "rloo",
    "dr_grpo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "ppo",
    "on_policy_distillation",
)
Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(Group):
    """Algorithm: advantages, loss and its terms."""

    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = arg(
        "policy_loss", "Policy gradient, likelihood of given responses, or --custom-loss-function-path."
    )
    custom_loss_function_path: str | None = arg(
        None, "f(args, batch, logits, sum_of_sample_mean) -> (loss, metrics), for --loss-type custom_loss."
    )
    advantage_estimator: str = arg(
        "grpo", f"How rewards become advantages: {', '.join(ESTIMATORS)}; or the dotted path of an Estimator."
    )
    compute_advantages_and_returns: bool = arg(
        True, "Leave out for a loss that needs neither.", disable="--disable-compute-advantages-and-returns"
    )
    custom_advantage_function_path: str | None = arg(
        None, "f(args, rollout_data) -> None: sets rollout_data['advantages'] and ['returns']."
    )
    rollout_data_postprocess_path: str | None = arg(
        None,
        "f(args, rollout_id, rollout_data) -> None on each trainer, after advantages; may change these and returns.",
    )
    custom_pg_loss_reducer_function_path: str | None = arg(
        None, "f(total_lengths, response_lengths, loss_masks, calculate_per_token_loss) -> reducer of the policy loss."
    )
    custom_convert_samples_to_train_data_path: str | None = arg(
        None, "f(args, samples) -> dict: replaces the conversion of samples to a training batch."
    )
    calculate_per_token_loss: bool = arg(
        False, "Mean over all tokens of a step; default: mean over samples of token means."
    )
    loss_length: int | None = arg(
        None, "What stands for the length of every response with dr_grpo (default: --rollout-max-response-len)."
    )
    rewards_normalization: bool = arg(
        True, "Subtract the group's mean reward.", disable="--disable-rewards-normalization"
    )
    grpo_std_normalization: bool = arg(
        True, "Divide by the group's standard deviation.", disable="--disable-grpo-std-normalization"
    )
    normalize_advantages: bool = arg(False, "Whiten advantages over the whole rollout.")
    gamma: float = arg(1.0, "Discount of rewards, a token.")
    lambd: float = arg(1.0, "GAE: between the one-step error (0) and the whole return (1).")
    eps_clip: float = arg(0.2, "Lower clip range of the probability ratio.")
    eps_clip_high: float | None = arg(None, "Upper clip range (default: --eps-clip).")
    eps_clip_c: float | None = arg(None, "Dual clip: bound of the loss where the advantage is negative; above 1.")
    value_clip: float = arg(0.2, "How far the critic's values move in one rollout before the gradient ends.")
    use_kl_loss: bool = arg(False, "Measure KL to the reference; it enters the loss with --kl-loss-coef.")
    kl_loss_coef: float = arg(0.0, "Weight of the KL loss.")
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = arg("k1", "Estimator of the KL, for loss and shaping.")
    use_unbiased_kl: bool = arg(False, "Weigh the KL loss by the probability ratio, so that it is unbiased off-policy.")
    kl_coef: float = arg(0.0, "Weight of the KL subtracted from the reward, before any normalisation.")
    ref_update_interval: int | None = arg(
        None, "Rollouts after which the reference becomes the actor (default: never)."
    )
    entropy_coef: float = arg(0.0, "Weight of the entropy bonus.")
    use_rollout_logprobs: bool = arg(False, "Take the engine's log-probs as those of the old policy.")
    use_rollout_entropy: bool = arg(
        False, "Compute the old policy's entropy before the update, for --custom-advantage-function-path."
    )
    keep_old_actor: bool = arg(False, "Old log-probs come from a copy of the weights that the engines sample with.")
    use_opsm: bool = arg(False, "Leave out sequences of negative advantage that the policy has moved away from.")
    opsm_delta: float = arg(1e-4, "KL of a sequence, a token, above which it is left out.")
    use_tis: bool = arg(False, "Correct for the difference between trainer and engine by importance weights.")
    tis_clip: float = arg(2.0, "Upper bound of the weights.")
    tis_clip_low: float = arg(0.0, "Lower bound of the weights.")
    tis_level: Level = arg("token", "Ratio of a token, of its sequence, or the geometric mean over its sequence.")
    tis_mode: Literal["clip", "truncate", "mask"] = arg(
        "clip", "Clip weights to the bounds, only from above, or drop what lies outside (icepop)."
    )
    tis_rs_level: Level | None = arg(None, "Also reject what lies outside other bounds at this level.")
    tis_rs_low: float = arg(0.5, "Lower bound of that rejection.")
    tis_rs_high: float = arg(2.0, "Upper bound of that rejection.")
    tis_veto: float | None = arg(None, "Reject a sequence that has a token of a ratio below this.")
    custom_tis_function_path: str | None = arg(None, "Replaces these weights; see docs/algorithms.md.")
    get_mismatch_metrics: bool = arg(True, "Report how far the trainer's log-probs are from the engine's.")
    use_routing_replay: bool = arg(
        False, "Mixtures of experts: update the policy with the experts that its old log-probs were computed with."
    )
    use_rollout_routing_replay: bool = arg(
        False, "Compute log-probs and update with the experts that the engine sampled with (R3)."
    )
    use_opd: bool = arg(False, "Subtract the KL to a teacher from the advantages of any estimator.")
    opd_kl_coef: float = arg(1.0, "Weight of that KL.")
    opd_type: Literal["sglang", "megatron"] | None = arg(
        None,
        "Where the teacher is: behind an engine's URL (sglang), or a model of the trainer, whatever --train-backend "
        "(megatron) (default: the trainer's with --opd-teacher-load).",
    )
    opd_teacher_load: str | None = arg(
        None, "The teacher as a model of the trainer: its Hugging Face directory or checkpoint folder."
    )
    opd_teacher_ckpt_step: int | None = arg(None, "Step of the teacher's checkpoint.")
    num_critic_only_steps: int = arg(0, "First rollouts on which only the critic learns.")
    critic_load: str | None = arg(
        None, "Checkpoint folder or Hugging Face directory of the critic (default: the actor's)."
    )
    critic_save: str | None = arg(None, "Checkpoint folder of the critic (default: below --save, in critic/).")
    critic_lr: float | None = arg(None, "Learning rate of the critic (default: --lr).")
    critic_lr_warmup_iters: int = arg(0, "Optimizer steps of the critic's linear warm-up.")

    def __post_init__(self) -> None:
        check_not_negative(self, "eps_clip", "eps_clip_high", "kl_coef", "kl_loss_coef", "opsm_delta", "opd_kl_coef")
        check_not_negative(self, "value_clip", "tis_clip_low", "tis_rs_low", "num_critic_only_steps", "critic_lr")
        check_not_negative(self, "critic_lr_warmup_iters", "opd_teacher_ckpt_step")
        check_positive(self, "ref_update_interval", "loss_length")
        for name in ("gamma", "lambd"):
            check(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))
        # CISPO bounds only above: a lower range of 1 or more is none.
        check(self.eps_clip < 1 or self.advantage_estimator == "cispo", "eps_clip", "below 1", self.eps_clip)
        check(self.eps_clip_c is None or self.eps_clip_c > 1, "eps_clip_c", "above 1", self.eps_clip_c)
        check(
            self.tis_clip_low <= self.tis_clip, "tis_clip_low", f"at most --tis-clip {self.tis_clip}", self.tis_clip_low
        )
        check(
            self.tis_rs_low <= self.tis_rs_high,
            "tis_rs_low",
            f"at most --tis-rs-high {self.tis_rs_high}",
            self.tis_rs_low,
        )
        check(self.tis_veto is None or 0 < self.tis_veto < 1, "tis_veto", "a ratio between 0 and 1", self.tis_veto)
        _check_estimator(self.advantage_estimator)
        super().__post_init__()

    @property
    def is_policy_loss(self) -> bool:
        """Whether the loss uses advantages and log-probs of other policies."""
        return self.loss_type != "sft_loss"

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probs of the reference model are wanted."""
        return self.is_policy_loss and (self.use_kl_loss or self.kl_coef > 0)

    @property
    def needs_teacher(self) -> bool:
        """Whether the log-probs of a teacher are wanted."""
        return self.is_policy_loss and (self.use_opd or self.advantage_estimator == "on_policy_distillation")

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the old policy's log-probs are wanted even where the policy has not moved since sampling."""
        compared = self.kl_coef > 0 or self.needs_teacher or self.custom_advantage_function_path is not None
        compared = compared or self.use_rollout_entropy
        return self.is_policy_loss and (compared or self.keep_old_actor or self.loss_type == "custom_loss")

    @property
    def needs_critic(self) -> bool:
        """Whether a critic is trained beside the actor."""
        return self.is_policy_loss and self.advantage_estimator == "ppo"


def _check_estimator(name: str) -> None:
    if name not in ESTIMATORS and "." not in name:
        raise ConfigError(
            f"{flag_of('advantage_estimator')} must be one of {', '.join(ESTIMATORS)}, or the dotted path of an "
            f"Estimator, got {name!r}."
        )
