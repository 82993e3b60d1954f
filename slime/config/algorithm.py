"""What is optimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.base import Group, arg, check, check_not_negative


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(Group):
    """Algorithm: advantages, loss and its terms."""

    loss_type: Literal["policy_loss", "sft_loss"] = arg(
        "policy_loss", "Policy gradient, or likelihood of given responses."
    )
    advantage_estimator: Literal["grpo"] = arg("grpo", "How rewards become advantages.")
    calculate_per_token_loss: bool = arg(
        False, "Mean over all tokens of a step; default: mean over samples of token means."
    )
    rewards_normalization: bool = arg(
        True, "Subtract the group's mean reward.", disable="--disable-rewards-normalization"
    )
    grpo_std_normalization: bool = arg(
        True, "Divide by the group's standard deviation.", disable="--disable-grpo-std-normalization"
    )
    eps_clip: float = arg(0.2, "Lower clip range of the probability ratio.")
    eps_clip_high: float | None = arg(None, "Upper clip range (default: --eps-clip).")
    use_kl_loss: bool = arg(False, "Measure KL to the reference; it enters the loss with --kl-loss-coef.")
    kl_loss_coef: float = arg(0.0, "Weight of the KL loss.")
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = arg("k1", "Estimator of the KL, for loss and shaping.")
    kl_coef: float = arg(0.0, "Weight of the KL subtracted from the reward, before group normalisation.")
    entropy_coef: float = arg(0.0, "Weight of the entropy bonus.")
    use_rollout_logprobs: bool = arg(False, "Take the engine's log-probs as those of the old policy.")

    def __post_init__(self) -> None:
        check_not_negative(self, "eps_clip", "eps_clip_high", "kl_coef", "kl_loss_coef")
        check(self.eps_clip < 1, "eps_clip", "below 1", self.eps_clip)
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probs of the reference model are wanted."""
        return self.loss_type == "policy_loss" and (self.use_kl_loss or self.kl_coef > 0)
