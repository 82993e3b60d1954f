"""The rules between settings, and the settings that follow from others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from slime.config.base import ConfigError, flag_of
from slime.config.rollout import DEFAULT_ROLLOUT_FUNCTION, FULLY_ASYNC_ROLLOUT_FUNCTION
from slime.config.run import RunConfig
from slime.config.served_models import ServedModel, groups_of, read_served_models

logger = logging.getLogger(__name__)

# Their advantages are relative to the group: one sample a prompt leaves nothing.
GROUP_ESTIMATORS = ("grpo", "gspo", "cispo", "rloo", "dr_grpo", "reinforce_plus_plus_baseline")
AGENT_GENERATE = "slime.agent.generate.generate"

RunT = TypeVar("RunT", bound=RunConfig)


def resolve(config: RunT) -> RunT:
    """`config` with every derived setting filled in. Raises ConfigError where settings contradict each other."""
    for rule in (_debug, _ci, _cluster, _checkpoint, _batch, _algorithm, _rollout, _evaluate):
        config = replace(config, **rule(config))
    return config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _debug(config: RunConfig) -> dict[str, Any]:
    """Parts of a run left out: what is then not asked for, and what takes its place."""
    changes: dict[str, Any] = {}
    if config.dump_details is not None:
        folder = Path(config.dump_details).resolve()
        changes["save_debug_rollout_data"] = (
            config.save_debug_rollout_data or f"{folder}/rollout_data/{{rollout_id}}.json"
        )
        changes["save_debug_train_data"] = (
            config.save_debug_train_data or f"{folder}/train_data/{{rollout_id}}_{{rank}}.npz"
        )
    if config.load_debug_rollout_data is not None:
        changes["debug_train_only"] = True
        changes["rollout_function_path"] = "slime.rollout.debug_data.generate_rollout"
        if config.num_rollout is not None:
            changes |= {"data_source_path": "slime.rollout.debug_data.NoPrompts", "rollout_global_dataset": False}
    _require(
        config.load_debug_rollout_data_subsample is None or config.load_debug_rollout_data is not None,
        "--load-debug-rollout-data-subsample goes with --load-debug-rollout-data.",
    )
    _require(
        config.memory_snapshot_num_steps is None or config.record_memory_history,
        "--memory-snapshot-num-steps has no effect without --record-memory-history: add it.",
    )
    if config.debug_rollout_only:
        _require(
            not (config.debug_train_only or config.load_debug_rollout_data),
            "--debug-rollout-only has no trainers, --debug-train-only and --load-debug-rollout-data no engines.",
        )
        _require(
            config.save is None, "--debug-rollout-only has nothing to save: drop --save, or name a --run-dir instead."
        )
        _require(
            config.max_weight_staleness is None,
            "--debug-rollout-only knows one version of the weights: drop --max-weight-staleness.",
        )
        slots = config.num_trainers if config.colocate else config.rollout_num_gpus or 0
        _require(slots > 0, "--rollout-num-gpus must be given and above 0, or --colocate.")
        # All slots are the engines': as in a colocated run in which trainers never start.
        changes |= {"colocate": True, "rollout_num_gpus": slots, "actor_num_nodes": 1, "actor_num_gpus_per_node": slots}
        changes |= {"critic_num_nodes": None, "critic_num_gpus_per_node": None, "keep_old_actor": False}
    return changes


def _ci(config: RunConfig) -> dict[str, Any]:
    needing = ("ci_disable_kl_checker", "ci_save_grad_norm", "ci_load_grad_norm", "ci_metric_checker_key")
    given = [name for name in needing if getattr(config, name)]
    _require(config.ci_test or not given, f"{', '.join(map(flag_of, given))}: has no effect without --ci-test: add it.")
    _require(
        (config.ci_metric_checker_key is None) == (config.ci_metric_checker_threshold is None),
        "--ci-metric-checker-key and --ci-metric-checker-threshold go together.",
    )
    return {}


def _cluster(config: RunConfig) -> dict[str, Any]:
    external = config.rollout_external_engine_addrs
    models = _file_models(config)
    if config.debug_train_only:
        num_slots = 0
    elif models:
        num_slots = _slots_of(models, config)
    elif external is not None:
        _external_engines(config, external)
        num_slots = 0
    elif config.colocate:
        num_slots = config.num_trainers
    else:
        num_slots = config.rollout_num_gpus or 0
        _require(num_slots > 0, "--rollout-num-gpus must be given and above 0, or --colocate.")
    if config.colocate and config.rollout_num_gpus not in (None, num_slots):
        logger.warning("--rollout-num-gpus %s is ignored: --colocate has %d", config.rollout_num_gpus, num_slots)
    _require(
        config.num_gpus_per_node is None or config.actor_num_gpus_per_node <= config.num_gpus_per_node,
        f"--actor-num-gpus-per-node {config.actor_num_gpus_per_node} is more than a node has: --num-gpus-per-node "
        f"{config.num_gpus_per_node}.",
    )
    _require(
        bool(models) or num_slots % config.rollout_num_gpus_per_engine == 0,
        f"--rollout-num-gpus-per-engine {config.rollout_num_gpus_per_engine} must divide the {num_slots} engine slots.",
    )
    _require(
        config.colocate or not (config.offload or config.offload_train or config.offload_rollout),
        "--offload, --offload-train and --offload-rollout need --colocate: otherwise nobody else wants the memory.",
    )
    trainers = {} if config.debug_rollout_only else {"trainer": config.num_trainers}
    for role, num_ranks in (trainers | ({"critic": config.num_critics} if config.needs_critic else {})).items():
        _require(
            num_ranks % config.context_parallel_size == 0,
            f"--context-parallel-size {config.context_parallel_size} must divide the {num_ranks} {role} ranks.",
        )
    return {
        "file_models": models,
        "rollout_num_gpus": num_slots,
        "offload_train": config.colocate if config.offload_train is None else config.offload_train,
        "offload_rollout": config.colocate if config.offload_rollout is None else config.offload_rollout,
    }


def _file_models(config: RunConfig) -> tuple[ServedModel, ...]:
    """The models of --sglang-config; none without it, or without engines."""
    if config.sglang_config is None or config.debug_train_only:
        return ()
    others = {
        "--prefill-num-servers": config.prefill_num_servers,
        "--rollout-external-engine-addrs": config.rollout_external_engine_addrs,
        "--sglang-router-ip": config.sglang_router_ip,
    }
    given = [flag for flag, value in others.items() if value is not None]
    names = ", ".join(given)
    _require(not given, f"--sglang-config names all engines, and starts a router for each model: drop {names}.")
    return read_served_models(
        config.sglang_config,
        checkpoint=config.hf_checkpoint,
        num_gpus_per_engine=config.rollout_num_gpus_per_engine,
    )


def _slots_of(models: Sequence[ServedModel], config: RunConfig) -> int:
    """Slots of all groups: those of the trainers with --colocate, else those of --rollout-num-gpus where given."""
    num_slots = sum(group.num_gpus for _, group in groups_of(models))
    wanted, flag = config.rollout_num_gpus, "--rollout-num-gpus"
    if config.colocate:
        wanted, flag = config.num_trainers, "the trainers' slots (--colocate)"
    _require(
        wanted in (None, num_slots),
        f"--sglang-config: {config.sglang_config}: its groups have {num_slots} slots in all, {flag} {wanted}: they "
        "must be equal; a group of worker_type placeholder takes slots without engines.",
    )
    return num_slots


def _external_engines(config: RunConfig, addresses: list[str]) -> None:
    for address in addresses:
        host, _, port = address.rpartition(":")
        _require(
            bool(host) and "/" not in host and port.isdecimal(),
            f"--rollout-external-engine-addrs takes HOST:PORT, got {address!r}.",
        )
    _require(
        len(set(addresses)) == len(addresses),
        "--rollout-external-engine-addrs names an engine twice: drop one of them.",
    )
    _require(
        not config.colocate,
        "--rollout-external-engine-addrs: engines of somebody else share no slots with trainers. Drop --colocate or "
        "--debug-rollout-only.",
    )
    if config.rollout_num_gpus is not None:
        logger.warning("--rollout-num-gpus %s is ignored: all engines are external", config.rollout_num_gpus)


def _checkpoint(config: RunConfig) -> dict[str, Any]:
    _require(config.save_hf is None or config.save is not None, "--save-hf needs --save: both are written together.")
    _require(not config.async_save or config.save is not None, "--async-save needs --save: a folder to write to.")
    _require(
        config.save_interval is None or config.save is not None, "--save-interval needs --save: a folder to write to."
    )
    _require(
        config.ref_ckpt_step is None or config.ref_load is not None,
        "--ref-ckpt-step needs --ref-load: the checkpoint folder that has this step.",
    )
    if not config.resume:
        _require(
            config.ckpt_step is None or config.load is not None,
            "--ckpt-step needs --load (or --resume): the checkpoint folder that has this step.",
        )
        if config.no_load_optim and config.load is None:
            logger.warning("--no-load-optim is ignored without --load or --resume")
        return {}
    _require(
        config.load in (None, config.save), f"--resume continues from --save {config.save}; drop --load {config.load}."
    )
    return {"load": config.save}


def _batch(config: RunConfig) -> dict[str, Any]:
    _require(config.rollout_batch_size is not None, "--rollout-batch-size must be given: the prompts of one rollout.")
    _require(
        config.num_rollout is not None or config.num_epoch is not None, "--num-rollout or --num-epoch must be given."
    )
    _require(
        config.num_rollout is not None or config.rollout_global_dataset,
        "--num-epoch counts passes over --prompt-data; with --disable-rollout-global-dataset give --num-rollout.",
    )
    _require(
        not config.use_dynamic_batch_size or config.max_tokens_per_gpu is not None,
        "--use-dynamic-batch-size needs --max-tokens-per-gpu.",
    )
    if config.max_tokens_per_gpu is not None and not config.use_dynamic_batch_size:
        logger.warning("--max-tokens-per-gpu is ignored without --use-dynamic-batch-size")
    if config.log_probs_max_tokens_per_gpu not in (None, config.max_tokens_per_gpu):
        logger.warning("--log-probs-max-tokens-per-gpu is ignored: log-probs take the micro-batches of training")
    num_samples = (config.rollout_batch_size or 0) * config.n_samples_per_prompt
    global_batch_size = config.global_batch_size or num_samples // (config.num_steps_per_rollout or 1)
    if config.num_steps_per_rollout is not None:
        _require(
            global_batch_size * config.num_steps_per_rollout == num_samples,
            f"--num-steps-per-rollout {config.num_steps_per_rollout} x --global-batch-size {global_batch_size} is not "
            f"--rollout-batch-size x --n-samples-per-prompt = {num_samples}.",
        )
    _require(
        global_batch_size <= num_samples and num_samples % global_batch_size == 0,
        f"--global-batch-size {global_batch_size} must divide --rollout-batch-size {config.rollout_batch_size} x "
        f"--n-samples-per-prompt {config.n_samples_per_prompt} = {num_samples}.",
    )
    _require(
        global_batch_size >= config.num_data_ranks or config.debug_rollout_only,
        f"--global-batch-size {global_batch_size} is smaller than the {config.num_data_ranks} trainer ranks that share "
        "it.",
    )
    return {
        "global_batch_size": global_batch_size,
        "num_steps_per_rollout": num_samples // global_batch_size,
        "log_probs_max_tokens_per_gpu": config.log_probs_max_tokens_per_gpu or config.max_tokens_per_gpu,
    }


def _algorithm(config: RunConfig) -> dict[str, Any]:
    _require(
        config.kl_coef == 0 or config.kl_loss_coef == 0,
        "--kl-coef (reward shaping) and --kl-loss-coef (loss) exclude each other: set one of them to 0.",
    )
    _require(
        config.kl_loss_coef == 0 or config.use_kl_loss, "--kl-loss-coef has no effect without --use-kl-loss: add it."
    )
    _require(
        not config.is_policy_loss
        or config.advantage_estimator not in GROUP_ESTIMATORS
        or config.n_samples_per_prompt > 1
        or not config.rewards_normalization
        or config.custom_reward_post_process_path is not None,
        "--n-samples-per-prompt 1 leaves every advantage at 0: sample more, or --disable-rewards-normalization.",
    )
    _require(
        config.kl_coef == 0 or config.custom_reward_post_process_path is None,
        "--kl-coef shapes rewards before they are normalised; --custom-reward-post-process-path does that itself.",
    )
    _combinations(config)
    return {
        "loss_length": config.loss_length or config.rollout_max_response_len,
        "eps_clip_high": config.eps_clip if config.eps_clip_high is None else config.eps_clip_high,
        "grpo_std_normalization": config.grpo_std_normalization and config.n_samples_per_prompt > 1,
    }


def _combinations(config: RunConfig) -> None:
    """Parts of the algorithm that exclude or need each other."""
    estimator = config.advantage_estimator
    _require(
        not estimator.startswith("reinforce_plus_plus") or config.normalize_advantages,
        f"--advantage-estimator {estimator} needs --normalize-advantages: the batch is its baseline.",
    )
    _require(
        not (config.use_rollout_logprobs and config.use_tis),
        "--use-rollout-logprobs and --use-tis exclude each other: the first leaves no difference to correct.",
    )
    _require(
        not (config.use_rollout_logprobs and config.keep_old_actor),
        "--use-rollout-logprobs and --keep-old-actor exclude each other: both say where old log-probs come from.",
    )
    _require(
        not (config.keep_old_actor and config.debug_train_only),
        "--keep-old-actor keeps what the engines sample with; --debug-train-only has none.",
    )
    _require(
        config.custom_tis_function_path is None or config.use_tis, "--custom-tis-function-path needs --use-tis: add it."
    )
    _require(
        not config.calculate_per_token_loss or estimator != "dr_grpo",
        "--advantage-estimator dr_grpo divides by a constant: drop --calculate-per-token-loss.",
    )
    _require(
        config.eps_clip_c is None or estimator != "cispo", "--eps-clip-c has no effect with cispo, which clips weights."
    )
    _require(
        config.ref_update_interval is None or config.needs_reference,
        "--ref-update-interval needs a reference: --use-kl-loss or --kl-coef.",
    )
    _require(
        (config.loss_type == "custom_loss") == (config.custom_loss_function_path is not None),
        "--loss-type custom_loss and --custom-loss-function-path go together.",
    )
    _require(
        config.compute_advantages_and_returns or config.loss_type == "custom_loss",
        "--disable-compute-advantages-and-returns needs --loss-type custom_loss: the policy loss uses them.",
    )
    _require(
        not (config.use_opd and estimator == "on_policy_distillation"),
        "--use-opd adds the teacher to another estimator; on_policy_distillation is the teacher alone.",
    )
    _require(
        config.opd_teacher_load is None or config.needs_teacher,
        "--opd-teacher-load has no effect without --use-opd or --advantage-estimator on_policy_distillation.",
    )
    _require(
        config.opd_type is None or config.needs_teacher,
        "--opd-type has no effect without --use-opd or --advantage-estimator on_policy_distillation.",
    )
    _require(
        config.opd_type is None or (config.opd_type == "megatron") == (config.opd_teacher_load is not None),
        "--opd-type megatron and --opd-teacher-load go together; with --opd-type sglang the rollout asks the teacher.",
    )
    _require(
        not (config.use_rollout_entropy and config.use_rollout_logprobs),
        "--use-rollout-entropy computes what --use-rollout-logprobs leaves out: choose one.",
    )
    _require(
        config.needs_critic or not config.has_critic_slots,
        "--critic-num-nodes and --critic-num-gpus-per-node need --advantage-estimator ppo, which has a critic.",
    )


def _rollout(config: RunConfig) -> dict[str, Any]:
    _require(bool(config.hf_checkpoint), "--hf-checkpoint must be given: the Hugging Face directory of the model.")
    _require(
        not config.rollout_global_dataset or config.prompt_data is not None,
        "--prompt-data must be given, or --disable-rollout-global-dataset.",
    )
    _require(
        (config.sglang_router_ip is None) == (config.sglang_router_port is None),
        "--sglang-router-ip and --sglang-router-port go together.",
    )
    _require(
        not config.debug_train_only or config.rollout_function_path != DEFAULT_ROLLOUT_FUNCTION,
        "--debug-train-only starts no engines and the default rollout needs them: give a --rollout-function-path that "
        "brings complete samples, such as slime.rollout.sft_rollout.generate_rollout.",
    )
    _require(
        config.completion_key is None or config.loss_type == "sft_loss",
        "--completion-key is for supervised fine-tuning: add --loss-type sft_loss, or leave it out.",
    )
    _require(
        config.update_weight_transport != "tensor" or (config.colocate and not config.has_critic_slots),
        "--update-weight-transport tensor is memory that every engine shares with a trainer of the policy: add "
        "--colocate, without slots of a critic's own, or use disk.",
    )
    _require(
        config.custom_update_weight_post_write_path is None or config.update_weight_transport == "disk",
        "--custom-update-weight-post-write-path needs --update-weight-transport disk: others write no files.",
    )
    _require(
        not config.update_weight_disk_keep_files
        or (config.update_weight_transport == "disk" and config.update_weight_disk_dir is not None),
        "--update-weight-disk-keep-files needs --update-weight-transport disk and --update-weight-disk-dir, which says "
        "where.",
    )
    transport = "distributed" if config.update_weight_transport == "nccl" else config.update_weight_transport
    _require(
        transport != "distributed" or not config.colocate,
        "--update-weight-transport distributed is a broadcast to other GPUs than the trainers': drop --colocate, or "
        "use tensor or disk.",
    )
    _require(
        config.update_weight_transport != "tensor" or config.debug_train_only or config.policy_engine_size is not None,
        "--update-weight-transport tensor needs engines of the policy alone, all of one size, on all slots: change "
        "--sglang-config, or use disk.",
    )
    _require(
        config.debug_train_only or (config.prefill_num_servers or 0) < max(1, config.num_engines),
        f"--prefill-num-servers {config.prefill_num_servers} must leave engines that decode; there are "
        f"{config.num_engines} in all.",
    )
    _require(
        config.prefill_num_servers is None or config.rollout_external_engine_addrs is None,
        "--prefill-num-servers says how engines are started: drop it, or --rollout-external-engine-addrs.",
    )
    _require(
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
    _check_prompt_fits("rollout", max_prompt_len, context)
    generate = AGENT_GENERATE if config.agent_function_path else config.custom_generate_function_path
    return {
        "rollout_max_prompt_len": max_prompt_len,
        "over_sampling_batch_size": _over_sampling(config),
        "update_weight_transport": transport,
        "custom_generate_function_path": generate,
    }


def _fully_async(config: RunConfig) -> None:
    function = FULLY_ASYNC_ROLLOUT_FUNCTION.rpartition(".")[2]
    _require(
        not config.colocate,
        f"{function} samples while trainers train: give engines slots of their own (--rollout-num-gpus) and drop "
        "--colocate.",
    )
    _require(
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
    _require(not given, f"--true-on-policy-mode: {' and '.join(given)}: change that, or drop --true-on-policy-mode.")


def _over_sampling(config: RunConfig) -> int:
    """Prompts that are started at once."""
    size: int = _first(config.over_sampling_batch_size, config.rollout_batch_size)
    _require(
        size >= (config.rollout_batch_size or 0),
        f"--over-sampling-batch-size {size} must be at least --rollout-batch-size {config.rollout_batch_size}.",
    )
    _require(
        not config.mask_offpolicy_in_partial_rollout or config.partial_rollout,
        "--mask-offpolicy-in-partial-rollout has no effect without --partial-rollout: add it.",
    )
    if config.partial_rollout and size == config.rollout_batch_size and config.dynamic_sampling_filter_path is None:
        logger.warning(
            "--partial-rollout leaves nothing unfinished without --over-sampling-batch-size above --rollout-batch-size"
        )
    return size


def _check_prompt_fits(kind: str, max_prompt_len: int | None, context: int | None) -> None:
    _require(
        max_prompt_len is None or context is None or max_prompt_len < context,
        f"--{kind}-max-prompt-len {max_prompt_len} must be below --{kind}-max-context-len {context}: a response needs "
        "at least one token.",
    )


def _evaluate(config: RunConfig) -> dict[str, Any]:
    has_sets = config.eval_prompt_data is not None or config.eval_config is not None
    _require(
        (config.eval_interval is None) == (not has_sets),
        "--eval-interval and --eval-prompt-data or --eval-config go together.",
    )
    if config.eval_prompt_data is not None and config.eval_config is not None:
        logger.warning("--eval-prompt-data is ignored: --eval-config %s names the sets", config.eval_config)
    _require(
        config.eval_interval is None or not config.debug_train_only,
        "--eval-interval needs engines: drop it, or --debug-train-only.",
    )
    max_prompt_len = _first(config.eval_max_prompt_len, config.rollout_max_prompt_len)
    if config.eval_max_prompt_len is None and config.eval_max_context_len is not None:
        longest = max(1, config.eval_max_context_len - 1)
        max_prompt_len = longest if max_prompt_len is None else min(max_prompt_len, longest)
    max_context_len = _first(config.eval_max_context_len, config.rollout_max_context_len)
    _check_prompt_fits("eval", max_prompt_len, max_context_len)
    return {
        "eval_input_key": config.eval_input_key or config.input_key,
        "eval_label_key": config.eval_label_key or config.label_key,
        "eval_tool_key": config.eval_tool_key or config.tool_key,
        "eval_temperature": _first(config.eval_temperature, config.rollout_temperature),
        "eval_top_p": _first(config.eval_top_p, config.rollout_top_p),
        "eval_top_k": _first(config.eval_top_k, config.rollout_top_k),
        "eval_max_response_len": _first(config.eval_max_response_len, config.rollout_max_response_len),
        "eval_max_prompt_len": max_prompt_len,
        "eval_max_context_len": max_context_len,
        "eval_reward_key": _first(config.eval_reward_key, config.reward_key),
    }


def check_loop(config: RunConfig, *, is_async: bool) -> None:
    """Raise ConfigError where the settings do not go with the loop: that of train_async.py, or the synchronous one."""
    interval, bound = config.update_weights_interval, config.max_weight_staleness
    _require(
        is_async or interval == 1,
        f"--update-weights-interval {interval} needs train_async.py: train.py updates after every rollout.",
    )
    _require(
        not (is_async and config.colocate and not config.debug_rollout_only),
        "train_async.py samples while trainers train: give engines slots of their own (--rollout-num-gpus) and drop "
        "--colocate.",
    )
    _require(
        not (is_async and config.true_on_policy_mode),
        "--true-on-policy-mode: train_async.py samples one rollout ahead of training. Use train.py.",
    )
    is_ahead = is_async or config.rollout_function_path == FULLY_ASYNC_ROLLOUT_FUNCTION
    _require(
        not (is_ahead and config.keep_old_actor),
        "--keep-old-actor keeps one version of the weights, asynchronous rollouts are sampled by earlier ones: use "
        "--use-rollout-logprobs.",
    )
    _require(
        not is_async or bound is None or bound >= interval,
        f"--max-weight-staleness {bound} cannot be held: train_async.py samples one rollout ahead, with weights that "
        f"are up to --update-weights-interval {interval} versions old.",
    )


def with_context(config: RunT, longest: int) -> RunT:
    """`config` with the contexts that are not given set to `longest`, the tokens that an engine takes.

    A prompt limit does not follow from it: a prompt that the user did not ask to leave out shall be an error.
    Raises ConfigError where a length that is given does not fit.
    """
    rollout_context = _first(config.rollout_max_context_len, longest)
    eval_context = _first(config.eval_max_context_len, rollout_context)
    _require(
        rollout_context <= longest or config.debug_train_only,
        f"--rollout-max-context-len {rollout_context} is more than the {longest} tokens of the model or of "
        "--sglang-context-length.",
    )
    _require(
        eval_context <= rollout_context,
        f"--eval-max-context-len {eval_context} is more than --rollout-max-context-len {rollout_context}: engines are "
        "started with the latter.",
    )
    _check_prompt_fits("rollout", config.rollout_max_prompt_len, rollout_context)
    _check_prompt_fits("eval", config.eval_max_prompt_len, eval_context)
    return replace(config, rollout_max_context_len=rollout_context, eval_max_context_len=eval_context)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
