"""Rules of rollouts, of what engines are given, and of evaluation."""

from __future__ import annotations

import logging
from typing import Any

from slime.config.rollout import DEFAULT_ROLLOUT_FUNCTION, FULLY_ASYNC_ROLLOUT_FUNCTION
from slime.config.rules.base import check_prompt_fits, first, require
from slime.config.run import RunConfig

logger = logging.getLogger(__name__)

AGENT_GENERATE = "slime.agent.generate.generate"


def rollout_rules(config: RunConfig) -> dict[str, Any]:
    """Prompts, engines, and how weights reach them."""
    require(bool(config.hf_checkpoint), "--hf-checkpoint must be given: the Hugging Face directory of the model.")
    require(
        not config.rollout_global_dataset or config.prompt_data is not None,
        "--prompt-data must be given, or --disable-rollout-global-dataset.",
    )
    require(
        (config.sglang_router_ip is None) == (config.sglang_router_port is None),
        "--sglang-router-ip and --sglang-router-port go together.",
    )
    require(
        not config.debug_train_only or config.rollout_function_path != DEFAULT_ROLLOUT_FUNCTION,
        "--debug-train-only starts no engines and the default rollout needs them: give a --rollout-function-path that "
        "brings complete samples, such as slime.rollout.sft_rollout.generate_rollout.",
    )
    require(
        config.completion_key is None or config.loss_type == "sft_loss",
        "--completion-key is for supervised fine-tuning: add --loss-type sft_loss, or leave it out.",
    )
    require(
        config.update_weight_transport != "tensor" or (config.colocate and not config.has_critic_slots),
        "--update-weight-transport tensor is memory that every engine shares with a trainer of the policy: add "
        "--colocate, without slots of a critic's own, or use disk.",
    )
    require(
        config.custom_update_weight_post_write_path is None or config.update_weight_transport == "disk",
        "--custom-update-weight-post-write-path needs --update-weight-transport disk: others write no files.",
    )
    require(
        not config.update_weight_disk_keep_files
        or (config.update_weight_transport == "disk" and config.update_weight_disk_dir is not None),
        "--update-weight-disk-keep-files needs --update-weight-transport disk and --update-weight-disk-dir, which says "
        "where.",
    )
    transport = "distributed" if config.update_weight_transport == "nccl" else config.update_weight_transport
    require(
        transport != "distributed" or not config.colocate,
        "--update-weight-transport distributed is a broadcast to other GPUs than the trainers': drop --colocate, or "
        "use tensor or disk.",
    )
    require(
        config.update_weight_transport != "tensor" or config.debug_train_only or config.policy_engine_size is not None,
        "--update-weight-transport tensor needs engines of the policy alone, all of one size, on all slots: change "
        "--sglang-config, or use disk.",
    )
    require(
        config.debug_train_only or (config.prefill_num_servers or 0) < max(1, config.num_engines),
        f"--prefill-num-servers {config.prefill_num_servers} must leave engines that decode; there are "
        f"{config.num_engines} in all.",
    )
    require(
        config.prefill_num_servers is None or config.rollout_external_engine_addrs is None,
        "--prefill-num-servers says how engines are started: drop it, or --rollout-external-engine-addrs.",
    )
    require(
        config.agent_function_path is None or config.custom_generate_function_path in (None, AGENT_GENERATE),
        "--agent-function-path and --custom-generate-function-path exclude each other: both generate a sample.",
    )
    if config.rollout_function_path == FULLY_ASYNC_ROLLOUT_FUNCTION:
        _fully_async(config)
    if config.true_on_policy_mode:
        _true_on_policy(config)
    max_prompt_len, context = config.rollout_max_prompt_len, config.rollout_max_context_len
    if max_prompt_len is None and context is not None:
        max_prompt_len = max(1, context - 1)
    check_prompt_fits("rollout", max_prompt_len, context)
    generate = AGENT_GENERATE if config.agent_function_path else config.custom_generate_function_path
    return {
        "rollout_max_prompt_len": max_prompt_len,
        "over_sampling_batch_size": _over_sampling(config),
        "update_weight_transport": transport,
        "custom_generate_function_path": generate,
    }


def _fully_async(config: RunConfig) -> None:
    function = FULLY_ASYNC_ROLLOUT_FUNCTION.rpartition(".")[2]
    require(
        not config.colocate,
        f"{function} samples while trainers train: give engines slots of their own (--rollout-num-gpus) and drop "
        "--colocate.",
    )
    require(
        config.dynamic_sampling_filter_path is None
        and not config.partial_rollout
        and config.over_sampling_batch_size in (None, config.rollout_batch_size),
        f"{function} keeps every group and ends none: drop --dynamic-sampling-filter-path, --partial-rollout and "
        "--over-sampling-batch-size, or use the default --rollout-function-path.",
    )


def _true_on_policy(config: RunConfig) -> None:
    """Refuse what brings samples of other weights than those that are trained."""
    others = {
        "--debug-train-only has no engines": config.debug_train_only,
        "--debug-rollout-only trains nothing": config.debug_rollout_only,
        "--loss-type sft_loss has no samples of the policy": config.loss_type == "sft_loss",
        "--partial-rollout goes on with what earlier weights began": config.partial_rollout,
        "fully asynchronous rollouts are sampled ahead": config.rollout_function_path == FULLY_ASYNC_ROLLOUT_FUNCTION,
        f"of {config.num_steps_per_rollout} optimizer steps a rollout (--num-steps-per-rollout, --global-batch-size) "
        "the second trains a policy that did not sample": config.num_steps_per_rollout != 1,
    }
    given = [what for what, is_given in others.items() if is_given]
    require(not given, f"--true-on-policy-mode: {' and '.join(given)}: change that, or drop --true-on-policy-mode.")


def _over_sampling(config: RunConfig) -> int:
    """Prompts that are started at once."""
    size: int = first(config.over_sampling_batch_size, config.rollout_batch_size)
    require(
        size >= (config.rollout_batch_size or 0),
        f"--over-sampling-batch-size {size} must be at least --rollout-batch-size {config.rollout_batch_size}.",
    )
    require(
        not config.mask_offpolicy_in_partial_rollout or config.partial_rollout,
        "--mask-offpolicy-in-partial-rollout has no effect without --partial-rollout: add it.",
    )
    if config.partial_rollout and size == config.rollout_batch_size and config.dynamic_sampling_filter_path is None:
        logger.warning(
            "--partial-rollout leaves nothing unfinished without --over-sampling-batch-size above --rollout-batch-size"
        )
    return size


def evaluate_rules(config: RunConfig) -> dict[str, Any]:
    """Evaluation takes from the rollout what it is not given."""
    has_sets = config.eval_prompt_data is not None or config.eval_config is not None
    require(
        (config.eval_interval is None) == (not has_sets),
        "--eval-interval and --eval-prompt-data or --eval-config go together.",
    )
    if config.eval_prompt_data is not None and config.eval_config is not None:
        logger.warning("--eval-prompt-data is ignored: --eval-config %s names the sets", config.eval_config)
    require(
        config.eval_interval is None or not config.debug_train_only,
        "--eval-interval needs engines: drop it, or --debug-train-only.",
    )
    max_prompt_len = first(config.eval_max_prompt_len, config.rollout_max_prompt_len)
    if config.eval_max_prompt_len is None and config.eval_max_context_len is not None:
        longest = max(1, config.eval_max_context_len - 1)
        max_prompt_len = longest if max_prompt_len is None else min(max_prompt_len, longest)
    max_context_len = first(config.eval_max_context_len, config.rollout_max_context_len)
    check_prompt_fits("eval", max_prompt_len, max_context_len)
    return {
        "eval_input_key": config.eval_input_key or config.input_key,
        "eval_label_key": config.eval_label_key or config.label_key,
        "eval_tool_key": config.eval_tool_key or config.tool_key,
        "eval_temperature": first(config.eval_temperature, config.rollout_temperature),
        "eval_top_p": first(config.eval_top_p, config.rollout_top_p),
        "eval_top_k": first(config.eval_top_k, config.rollout_top_k),
        "eval_max_response_len": first(config.eval_max_response_len, config.rollout_max_response_len),
        "eval_max_prompt_len": max_prompt_len,
        "eval_max_context_len": max_context_len,
        "eval_reward_key": first(config.eval_reward_key, config.reward_key),
    }
