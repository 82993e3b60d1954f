"""Rules of the algorithm: parts that exclude or need each other."""

from __future__ import annotations

from typing import Any

from slime.config.rules.base import require
from slime.config.run import RunConfig

# Their advantages are relative to the group: one sample a prompt leaves nothing.
GROUP_ESTIMATORS = ("grpo", "gspo", "cispo", "rloo", "dr_grpo", "reinforce_plus_plus_baseline")


def algorithm_rules(config: RunConfig) -> dict[str, Any]:
    """Shaping of rewards, and the settings of the loss."""
    require(
        config.kl_coef == 0 or config.kl_loss_coef == 0,
        "--kl-coef (reward shaping) and --kl-loss-coef (loss) exclude each other: set one of them to 0.",
    )
    require(
        config.kl_loss_coef == 0 or config.use_kl_loss, "--kl-loss-coef has no effect without --use-kl-loss: add it."
    )
    require(
        not config.is_policy_loss
        or config.advantage_estimator not in GROUP_ESTIMATORS
        or config.n_samples_per_prompt > 1
        or not config.rewards_normalization
        or config.custom_reward_post_process_path is not None,
        "--n-samples-per-prompt 1 leaves every advantage at 0: sample more, or --disable-rewards-normalization.",
    )
    require(
        config.kl_coef == 0 or config.custom_reward_post_process_path is None,
        "--kl-coef shapes rewards before they are normalised; --custom-reward-post-process-path does that itself.",
    )
    _combinations(config)
    _routing_replay(config)
    return {
        "use_routing_replay": config.use_routing_replay or config.use_rollout_routing_replay,
        "loss_length": config.loss_length or config.rollout_max_response_len,
        "eps_clip_high": config.eps_clip if config.eps_clip_high is None else config.eps_clip_high,
        "grpo_std_normalization": config.grpo_std_normalization and config.n_samples_per_prompt > 1,
    }


def _routing_replay(config: RunConfig) -> None:
    """Experts that are kept, and whose they are."""
    kept = config.use_routing_replay or config.use_rollout_routing_replay
    require(
        not kept or config.is_policy_loss,
        "--use-routing-replay and --use-rollout-routing-replay compare policies: drop them with --loss-type sft_loss.",
    )
    require(
        not (config.use_routing_replay and config.use_rollout_logprobs) or config.use_rollout_routing_replay,
        "--use-routing-replay keeps the experts of old log-probs, which --use-rollout-logprobs leaves out: use "
        "--use-rollout-routing-replay.",
    )
    require(
        not config.use_rollout_routing_replay or not config.policy.is_disaggregated,
        "--use-rollout-routing-replay: engines that compute prompts apart do not return their experts. Drop it, or "
        "--prefill-num-servers.",
    )


def _combinations(config: RunConfig) -> None:
    """Parts of the algorithm that exclude or need each other."""
    estimator = config.advantage_estimator
    require(
        not estimator.startswith("reinforce_plus_plus") or config.normalize_advantages,
        f"--advantage-estimator {estimator} needs --normalize-advantages: the batch is its baseline.",
    )
    require(
        not (config.use_rollout_logprobs and config.use_tis),
        "--use-rollout-logprobs and --use-tis exclude each other: the first leaves no difference to correct.",
    )
    require(
        not (config.use_rollout_logprobs and config.keep_old_actor),
        "--use-rollout-logprobs and --keep-old-actor exclude each other: both say where old log-probs come from.",
    )
    require(
        not (config.keep_old_actor and config.debug_train_only),
        "--keep-old-actor keeps what the engines sample with; --debug-train-only has none.",
    )
    require(
        config.custom_tis_function_path is None or config.use_tis, "--custom-tis-function-path needs --use-tis: add it."
    )
    require(
        not config.calculate_per_token_loss or estimator != "dr_grpo",
        "--advantage-estimator dr_grpo divides by a constant: drop --calculate-per-token-loss.",
    )
    require(
        config.eps_clip_c is None or estimator != "cispo", "--eps-clip-c has no effect with cispo, which clips weights."
    )
    require(
        config.ref_update_interval is None or config.needs_reference,
        "--ref-update-interval needs a reference: --use-kl-loss or --kl-coef.",
    )
    require(
        (config.loss_type == "custom_loss") == (config.custom_loss_function_path is not None),
        "--loss-type custom_loss and --custom-loss-function-path go together.",
    )
    require(
        config.compute_advantages_and_returns or config.loss_type == "custom_loss",
        "--disable-compute-advantages-and-returns needs --loss-type custom_loss: the policy loss uses them.",
    )
    require(
        not (config.use_opd and estimator == "on_policy_distillation"),
        "--use-opd adds the teacher to another estimator; on_policy_distillation is the teacher alone.",
    )
    require(
        config.opd_teacher_load is None or config.needs_teacher,
        "--opd-teacher-load has no effect without --use-opd or --advantage-estimator on_policy_distillation.",
    )
    require(
        config.opd_type is None or config.needs_teacher,
        "--opd-type has no effect without --use-opd or --advantage-estimator on_policy_distillation.",
    )
    require(
        config.opd_type is None or (config.opd_type == "megatron") == (config.opd_teacher_load is not None),
        "--opd-type megatron and --opd-teacher-load go together; with --opd-type sglang the rollout asks the teacher.",
    )
    require(
        not (config.use_rollout_entropy and config.use_rollout_logprobs),
        "--use-rollout-entropy computes what --use-rollout-logprobs leaves out: choose one.",
    )
    require(
        config.needs_critic or not config.has_critic_slots,
        "--critic-num-nodes and --critic-num-gpus-per-node need --advantage-estimator ppo, which has a critic.",
    )
