"""Every rule between settings, by the sentence that a user gets."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from slime.arguments import Args
from slime.config import ConfigError
from slime.config.rollout import FULLY_ASYNC_ROLLOUT_FUNCTION as FULLY_ASYNC
from slime.config.validate import check_loop, resolve, with_context

MINIMAL: dict[str, Any] = {
    "hf_checkpoint": "model",
    "prompt_data": "prompts.jsonl",
    "rollout_batch_size": 4,
    "n_samples_per_prompt": 2,
    "num_rollout": 3,
    "rollout_num_gpus": 1,
    "actor_num_gpus_per_node": 1,
}
SFT = {"rollout_function_path": "slime.rollout.sft_rollout.generate_rollout"}


def resolved(**settings: Any) -> Args:
    return resolve(Args(**MINIMAL | settings))


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"update_weight_transport": "tensor", "colocate": False, "rollout_num_gpus": 1},
        "--update-weight-transport tensor is memory that every engine shares with a trainer of the policy: add",
    ),
    (
        {"update_weight_transport": "tensor", "advantage_estimator": "ppo", "critic_num_gpus_per_node": 1},
        "without slots of a critic's own, or use disk.",
    ),
    (
        {"update_weight_transport": "nccl", "colocate": True, "rollout_num_gpus": None},
        "--update-weight-transport distributed is a broadcast to other GPUs than the trainers': drop --colocate",
    ),
    (
        {"custom_update_weight_post_write_path": "my_files.copy"},
        "--custom-update-weight-post-write-path needs --update-weight-transport disk: others write no files.",
    ),
    (
        {"update_weight_disk_keep_files": True, "update_weight_transport": "disk"},
        "--update-weight-disk-keep-files needs --update-weight-transport disk and --update-weight-disk-dir, which",
    ),
    # routing replay
    ({"use_routing_replay": True, "loss_type": "sft_loss"}, "compare policies: drop them with --loss-type sft_loss."),
    (
        {"use_routing_replay": True, "use_rollout_logprobs": True},
        "keeps the experts of old log-probs, which --use-rollout-logprobs leaves out: use --use-rollout-routing-",
    ),
    (
        {
            "use_rollout_routing_replay": True,
            "rollout_num_gpus": 2,
            "prefill_num_servers": 1,
            "rollout_engine": "sglang",
        },
        "engines that compute prompts apart do not return their experts. Drop it, or --prefill-num-servers.",
    ),
    # on policy
    ({"true_on_policy_mode": True, "num_steps_per_rollout": 2}, "of 2 optimizer steps a rollout (--num-steps-per-roll"),
    ({"true_on_policy_mode": True, "partial_rollout": True}, "--true-on-policy-mode: --partial-rollout goes on with"),
    ({"true_on_policy_mode": True, "rollout_function_path": FULLY_ASYNC}, "fully asynchronous rollouts are sampled ah"),
    ({"true_on_policy_mode": True, "loss_type": "sft_loss"}, "--loss-type sft_loss has no samples of the policy"),
    ({"true_on_policy_mode": True, "debug_train_only": True} | SFT, "--debug-train-only has no engines: change that"),
    ({"true_on_policy_mode": True, "debug_rollout_only": True}, "--debug-rollout-only trains nothing: change that"),
    # checks
    ({"ci_save_grad_norm": "{rollout_id}", "ci_disable_kl_checker": True}, "--ci-disable-kl-checker, --ci-save-grad-n"),
    ({"ci_test": True, "ci_metric_checker_key": "eval/a"}, "--ci-metric-checker-key and --ci-metric-checker-threshold"),
    ({"ci_test": True, "ci_save_grad_norm": "norm.json"}, "--ci-save-grad-norm must be a path in which {rollout_id}"),
    ({"ci_train_rollout_logprob_abs_diff_threshold": 0.0}, "--ci-train-rollout-logprob-abs-diff-threshold must be ab"),
    # processes
    ({"train_env_vars": {"A": "b", "C": ["d"]}}, "--train-env-vars must be names with texts or numbers, got 'C'"),
    ({"rollout_health_check_first_wait": -1.0}, "--rollout-health-check-first-wait must be 0 or more"),
    # asynchrony
    ({"rollout_function_path": FULLY_ASYNC, "colocate": True, "rollout_num_gpus": None}, "samples while trainers trai"),
    ({"rollout_function_path": FULLY_ASYNC, "partial_rollout": True}, "generate_rollout_fully_async keeps every group"),
    ({"max_weight_staleness": -1}, "--max-weight-staleness must be 0 or more"),
    ({"update_weights_interval": 0}, "--update-weights-interval must be above 0"),
    # context parallelism
    ({"context_parallel_size": 0}, "--context-parallel-size must be above 0, got 0"),
    ({"context_parallel_size": 2}, "--context-parallel-size 2 must divide the 1 trainer ranks"),
    (
        {"context_parallel_size": 2, "actor_num_gpus_per_node": 2, "critic_num_gpus_per_node": 3}
        | {"advantage_estimator": "ppo"},
        "--context-parallel-size 2 must divide the 3 critic ranks",
    ),
    # the algorithm's parts
    ({"advantage_estimator": "grop"}, "or the dotted path of an Estimator, got 'grop'"),
    ({"advantage_estimator": "reinforce_plus_plus"}, "--advantage-estimator reinforce_plus_plus needs --normalize-adv"),
    ({"use_rollout_logprobs": True, "use_tis": True}, "--use-rollout-logprobs and --use-tis exclude each other"),
    ({"use_rollout_logprobs": True, "keep_old_actor": True}, "--use-rollout-logprobs and --keep-old-actor exclude"),
    ({"keep_old_actor": True, "debug_train_only": True} | SFT, "--keep-old-actor keeps what the engines sample with"),
    ({"custom_tis_function_path": "a.b"}, "--custom-tis-function-path needs --use-tis"),
    ({"advantage_estimator": "dr_grpo", "calculate_per_token_loss": True}, "dr_grpo divides by a constant"),
    ({"advantage_estimator": "cispo", "eps_clip_c": 3.0}, "--eps-clip-c has no effect with cispo"),
    ({"eps_clip_c": 1.0}, "--eps-clip-c must be above 1, got 1.0"),
    ({"ref_update_interval": 2}, "--ref-update-interval needs a reference"),
    ({"loss_type": "custom_loss"}, "--loss-type custom_loss and --custom-loss-function-path go together"),
    ({"compute_advantages_and_returns": False}, "--disable-compute-advantages-and-returns needs --loss-type custom"),
    ({"advantage_estimator": "on_policy_distillation", "use_opd": True}, "on_policy_distillation is the teacher alone"),
    ({"opd_teacher_load": "dir"}, "--opd-teacher-load has no effect without --use-opd"),
    ({"opd_type": "sglang"}, "--opd-type has no effect without --use-opd"),
    ({"use_opd": True, "opd_type": "megatron"}, "--opd-type megatron and --opd-teacher-load go together"),
    ({"use_opd": True, "opd_type": "sglang", "opd_teacher_load": "dir"}, "with --opd-type sglang the rollout asks"),
    ({"use_rollout_entropy": True, "use_rollout_logprobs": True}, "computes what --use-rollout-logprobs leaves out"),
    ({"critic_num_nodes": 1}, "--critic-num-nodes and --critic-num-gpus-per-node need --advantage-estimator ppo"),
    ({"tis_clip": 1.0, "tis_clip_low": 2.0}, "--tis-clip-low must be at most --tis-clip 1.0, got 2.0"),
    ({"tis_veto": 1.0}, "--tis-veto must be a ratio between 0 and 1, got 1.0"),
    ({"gamma": 1.1}, "--gamma must be between 0 and 1, got 1.1"),
    # parts left out
    ({"debug_rollout_only": True, "debug_train_only": True}, "--debug-rollout-only has no trainers, --debug-train"),
    ({"debug_rollout_only": True, "save": "dir"}, "--debug-rollout-only has nothing to save: drop --save"),
    ({"debug_rollout_only": True, "rollout_num_gpus": None}, "--rollout-num-gpus must be given"),
    ({"save_debug_rollout_data": "dir/all.json"}, "--save-debug-rollout-data must be a path in which {rollout_id} is"),
    ({"save_debug_train_data": "{rollout_id}.npz"}, "a path in which {rollout_id} and {rank} is filled in"),
    ({"load_debug_rollout_data": "{rollout_id"}, "--load-debug-rollout-data must be a path in which"),
    ({"load_debug_rollout_data": "{rollout_id}", "eval_interval": 1, "eval_prompt_data": ["a", "b"]}, "needs engines"),
    ({"completion_key": "completion"}, "--completion-key is for supervised fine-tuning: add --loss-type sft_loss"),
    ({"load_debug_rollout_data_subsample": 0.5}, "--load-debug-rollout-data-subsample goes with"),
    ({"load_debug_rollout_data_subsample": 0.0}, "--load-debug-rollout-data-subsample must be above 0 and at most 1"),
    ({"debug_rollout_only": True, "max_weight_staleness": 1}, "--debug-rollout-only knows one version of the weights"),
    # agents
    ({"agent_function_path": "a.b", "custom_generate_function_path": "c.d"}, "--agent-function-path and --custom-gen"),
    ({"agent_timeout_s": 0.0}, "--agent-timeout-s must be above 0"),
    # the cluster
    ({"rollout_num_gpus": None}, "--rollout-num-gpus must be given"),
    ({"rollout_num_gpus": 3, "rollout_num_gpus_per_engine": 2}, "--rollout-num-gpus-per-engine 2 must divide the 3"),
    ({"offload": True}, "--offload, --offload-train and --offload-rollout need --colocate"),
    ({"offload_train": True}, "need --colocate"),
    ({"offload_rollout": True}, "need --colocate"),
    ({"actor_num_nodes": 0}, "--actor-num-nodes must be above 0, got 0"),
    ({"actor_num_gpus_per_node": 4, "num_gpus_per_node": 2}, "--actor-num-gpus-per-node 4 is more than a node has"),
    ({"num_threads": -1}, "--num-threads must be above 0, got -1"),
    ({"engine_start_timeout_s": 0.0}, "--engine-start-timeout-s must be above 0, got 0.0"),
    ({"rollout_timeout_s": float("nan")}, "--rollout-timeout-s must be above 0, got nan"),
    # checkpoints
    ({"save_hf": "out"}, "--save-hf needs --save"),
    ({"save_interval": 2}, "--save-interval needs --save"),
    ({"save": "a", "save_interval": 0}, "--save-interval must be above 0, got 0"),
    ({"save": "a", "save_hf": "out/{step}"}, "--save-hf must be a path in which only {rollout_id} is filled in"),
    ({"save": "a", "save_hf": "out/{"}, "--save-hf must be a path in which only {rollout_id} is filled in"),
    ({"resume": True}, "--save must be given with --resume"),
    ({"resume": True, "save": "a", "load": "b"}, "--resume continues from --save a; drop --load b"),
    ({"ckpt_step": -1}, "--ckpt-step must be 0 or more, got -1"),
    ({"ckpt_step": 3}, "--ckpt-step needs --load (or --resume)"),
    ({"ref_ckpt_step": 3}, "--ref-ckpt-step needs --ref-load"),
    # batches
    ({"rollout_batch_size": None}, "--rollout-batch-size must be given"),
    ({"rollout_batch_size": 0}, "--rollout-batch-size must be above 0, got 0"),
    ({"num_rollout": None}, "--num-rollout or --num-epoch must be given"),
    (
        {"num_rollout": None, "num_epoch": 1, "rollout_global_dataset": False},
        "--num-epoch counts passes over --prompt-data",
    ),
    ({"use_dynamic_batch_size": True}, "--use-dynamic-batch-size needs --max-tokens-per-gpu"),
    (
        {"num_steps_per_rollout": 3},
        "--num-steps-per-rollout 3 x --global-batch-size 2 is not --rollout-batch-size x --n-samples-per-prompt = 8",
    ),
    ({"num_steps_per_rollout": 2, "global_batch_size": 8}, "--num-steps-per-rollout 2 x --global-batch-size 8 is not"),
    ({"num_steps_per_rollout": 9}, "--num-steps-per-rollout 9 x"),
    (
        {"global_batch_size": 3},
        "--global-batch-size 3 must divide --rollout-batch-size 4 x",
    ),
    ({"global_batch_size": 16}, "--global-batch-size 16 must divide"),
    (
        {"global_batch_size": 1, "actor_num_gpus_per_node": 2},
        "1 is smaller than the 2 trainer ranks",
    ),
    ({"micro_batch_size": 0}, "--micro-batch-size must be above 0, got 0"),
    ({"log_probs_chunk_size": -1}, "--log-probs-chunk-size must be above 0, got -1"),
    # the optimizer
    ({"lr": -1.0}, "--lr must be 0 or more, got -1.0"),
    ({"lr": 1e-6, "min_lr": 1e-5}, "--min-lr must be at most --lr 1e-06, got 1e-05"),
    ({"adam_beta2": 1.0}, "--adam-beta2 must be at least 0 and below 1, got 1.0"),
    ({"clip_grad": -0.1}, "--clip-grad must be 0 or more, got -0.1"),
    ({"lr_warmup_fraction": 1.5}, "--lr-warmup-fraction must be between 0 and 1, got 1.5"),
    ({"lr_warmup_fraction": 0.5, "lr_warmup_iters": 3}, "--lr-warmup-fraction must be left out where"),
    ({"lr": float("nan")}, "--lr must be 0 or more, got nan"),
    ({"weight_decay": float("inf")}, "--weight-decay must be a finite number, got inf"),
    ({"entropy_coef": float("nan")}, "--entropy-coef must be a finite number, got nan"),
    # the algorithm
    (
        {"kl_coef": 0.1, "use_kl_loss": True, "kl_loss_coef": 0.1},
        "--kl-coef (reward shaping) and --kl-loss-coef",
    ),
    ({"kl_loss_coef": 0.1}, "--kl-loss-coef has no effect without --use-kl-loss"),
    ({"n_samples_per_prompt": 1}, "--n-samples-per-prompt 1 leaves every advantage at 0"),
    ({"kl_coef": 0.1, "custom_reward_post_process_path": "a.b"}, "--kl-coef shapes rewards before they are normalised"),
    ({"eps_clip": 1.0}, "--eps-clip must be below 1, got 1.0"),
    ({"eps_clip_high": -0.1}, "--eps-clip-high must be 0 or more, got -0.1"),
    ({"kl_coef": -0.1}, "--kl-coef must be 0 or more, got -0.1"),
    # the rollout
    ({"hf_checkpoint": ""}, "--hf-checkpoint must be given"),
    ({"prompt_data": None}, "--prompt-data must be given, or --disable-rollout-global-dataset"),
    ({"sglang_router_ip": "10.0.0.1"}, "--sglang-router-ip and --sglang-router-port go together"),
    ({"sglang_router_port": 1}, "--sglang-router-ip and --sglang-router-port go together"),
    ({"rollout_temperature": 0.0}, "--rollout-temperature must be above 0, got 0.0"),
    ({"rollout_top_p": 1.1}, "--rollout-top-p must be above 0 and at most 1, got 1.1"),
    ({"rollout_top_k": 0}, "--rollout-top-k must be -1 or above 0, got 0"),
    ({"debug_train_only": True}, "--debug-train-only starts no engines and the default rollout needs them"),
    ({"rollout_max_context_len": 8, "rollout_max_prompt_len": 8}, "--rollout-max-prompt-len 8 must be below"),
    ({"rollout_seed": -1}, "--rollout-seed must be 0 or more, got -1"),
    # rewards
    ({"max_failed_fraction": 1.5}, "--max-failed-fraction must be between 0 and 1, got 1.5"),
    ({"rm_timeout_s": 0.0}, "--rm-timeout-s must be above 0, got 0.0"),
    ({"group_rm": True, "custom_rm_style": "verl"}, "--group-rm must be off: a verl function has one sample"),
    ({"rm_num_workers": -1}, "--rm-num-workers must be 0 or more, got -1"),
    # evaluation
    ({"eval_interval": 1}, "--eval-interval and --eval-prompt-data or --eval-config go together"),
    ({"eval_config": "sets.yaml"}, "--eval-interval and --eval-prompt-data or --eval-config go together"),
    (
        {"eval_prompt_data": ["test", "test.jsonl"]},
        "--eval-interval and --eval-prompt-data or --eval-config go together",
    ),
    ({"eval_prompt_data": ["test.jsonl"], "eval_interval": 1}, "--eval-prompt-data must be pairs of a name and a file"),
    (
        {"eval_prompt_data": ["t", "t.jsonl"], "eval_interval": 1, "debug_train_only": True, **SFT},
        "--eval-interval needs engines",
    ),
    (
        {"eval_prompt_data": ["t", "a.jsonl", "t", "b.jsonl"], "eval_interval": 1},
        "--eval-prompt-data must be pairs whose names differ, got ['t', 't']",
    ),
    ({"eval_temperature": -0.1}, "--eval-temperature must be 0 or more, got -0.1"),
    ({"eval_top_p": 0.0}, "--eval-top-p must be above 0 and at most 1, got 0.0"),
    ({"eval_top_k": 0}, "--eval-top-k must be -1 or above 0, got 0"),
    ({"eval_max_context_len": 8, "eval_max_prompt_len": 9}, "--eval-max-prompt-len 9 must be below"),
    ({"n_samples_per_eval_prompt": 0}, "--n-samples-per-eval-prompt must be above 0, got 0"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_what_contradicts_itself_is_refused_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


DERIVED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"global_batch_size": 8, "num_steps_per_rollout": 1}),
    ({"num_steps_per_rollout": 4}, {"global_batch_size": 2}),
    ({"global_batch_size": 2}, {"num_steps_per_rollout": 4}),
    ({"num_steps_per_rollout": 2, "global_batch_size": 4}, {"global_batch_size": 4}),
    ({}, {"offload_train": False, "offload_rollout": False}),
    ({"colocate": True}, {"offload_train": True, "offload_rollout": True, "rollout_num_gpus": 1}),
    ({"colocate": True, "offload_train": False}, {"offload_train": False, "offload_rollout": True}),
    ({"colocate": True, "actor_num_nodes": 2, "rollout_num_gpus": None}, {"rollout_num_gpus": 2}),
    ({"debug_train_only": True, "rollout_num_gpus": None, **SFT}, {"rollout_num_gpus": 0}),
    ({"debug_train_only": True, "prefill_num_servers": 1, **SFT}, {"rollout_num_gpus": 0}),
    ({}, {"eps_clip_high": 0.2}),
    ({"eps_clip": 0.1, "eps_clip_high": 0.0}, {"eps_clip_high": 0.0}),
    ({"n_samples_per_prompt": 1, "rewards_normalization": False}, {"grpo_std_normalization": False}),
    ({"n_samples_per_prompt": 1, "loss_type": "sft_loss"}, {"loss_type": "sft_loss"}),
    ({"n_samples_per_prompt": 1, "custom_reward_post_process_path": "a.b"}, {"n_samples_per_prompt": 1}),
    ({"save": "a", "resume": True}, {"load": "a"}),
    ({"save": "a", "resume": True, "load": "a"}, {"load": "a"}),
    ({"save": "a", "save_hf": "out/{rollout_id:04d}"}, {"save_hf": "out/{rollout_id:04d}"}),
    ({"rollout_max_context_len": 100}, {"rollout_max_prompt_len": 99, "eval_max_context_len": 100}),
    ({"rollout_max_context_len": 100, "rollout_max_prompt_len": 7}, {"rollout_max_prompt_len": 7}),
    ({"rollout_max_context_len": 100, "eval_max_context_len": 50}, {"eval_max_prompt_len": 49}),
    ({"rollout_max_prompt_len": 7, "eval_max_context_len": 50}, {"eval_max_prompt_len": 7}),
    ({"ckpt_step": 3, "save": "a", "resume": True}, {"ckpt_step": 3}),
    ({"eval_temperature": 0.0, "rollout_temperature": 0.7}, {"eval_temperature": 0.0}),
    ({"rollout_temperature": 0.7, "label_key": "answer"}, {"eval_temperature": 0.7, "eval_label_key": "answer"}),
    ({"reward_key": "score"}, {"eval_reward_key": "score"}),
    ({"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64}, {"log_probs_max_tokens_per_gpu": 64}),
    ({"update_weight_transport": "nccl"}, {"update_weight_transport": "distributed"}),
]


@pytest.mark.parametrize(("settings", "expected"), DERIVED, ids=[str(settings) for settings, _ in DERIVED])
def test_what_follows_from_other_settings_is_filled_in(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    args = resolved(**settings)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "is_async", "message"),
    [
        ({"colocate": True, "rollout_num_gpus": None}, True, "train_async.py samples while trainers train: give eng"),
        ({"update_weights_interval": 2}, False, "--update-weights-interval 2 needs train_async.py"),
        ({"max_weight_staleness": 0}, True, "--max-weight-staleness 0 cannot be held"),
        ({"max_weight_staleness": 1, "update_weights_interval": 2}, True, "up to --update-weights-interval 2 versions"),
        ({"true_on_policy_mode": True}, True, "train_async.py samples one rollout ahead of training. Use train.py."),
        ({"keep_old_actor": True}, True, "--keep-old-actor keeps one version"),
        ({"keep_old_actor": True, "rollout_function_path": FULLY_ASYNC}, False, "--keep-old-actor keeps one version"),
    ],
)
def test_what_does_not_go_with_the_loop_is_refused(settings: dict[str, Any], is_async: bool, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_loop(resolved(**settings), is_async=is_async)
    assert message in str(refusal.value)


def test_each_loop_takes_what_is_its_own() -> None:
    check_loop(
        resolved(colocate=True, rollout_num_gpus=None, max_weight_staleness=0, keep_old_actor=True), is_async=False
    )
    check_loop(resolved(update_weights_interval=2, max_weight_staleness=2), is_async=True)
    check_loop(resolved(debug_rollout_only=True), is_async=True)


def test_ranks_that_share_tokens_need_fewer_samples() -> None:
    args = resolved(global_batch_size=1, actor_num_gpus_per_node=2, context_parallel_size=2)
    assert (args.num_trainers, args.num_data_ranks) == (2, 1)


def test_resolving_twice_changes_nothing() -> None:
    once = resolved(colocate=True, save="a", resume=True, num_steps_per_rollout=2)
    assert vars(resolve(once)) == vars(once)


def test_the_models_context_bounds_requests_but_leaves_no_prompt_out() -> None:
    args = with_context(resolved(), 64)
    assert (args.rollout_max_context_len, args.eval_max_context_len) == (64, 64)
    assert (args.rollout_max_prompt_len, args.eval_max_prompt_len) == (None, None)


def test_contexts_that_are_given_stay() -> None:
    args = with_context(resolved(rollout_max_context_len=32, eval_max_context_len=16), 64)
    assert (args.rollout_max_context_len, args.eval_max_context_len) == (32, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_max_context_len": 65}, "--rollout-max-context-len 65 is more than the 64 tokens of the model"),
        ({"rollout_max_context_len": 8, "eval_max_context_len": 9}, "--eval-max-context-len 9 is more than"),
        ({"rollout_max_prompt_len": 64}, "--rollout-max-prompt-len 64 must be below --rollout-max-context-len 64"),
        ({"eval_max_prompt_len": 64}, "--eval-max-prompt-len 64 must be below --eval-max-context-len 64"),
    ],
)
def test_lengths_that_exceed_the_engines_context_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_context(resolved(**settings), 64)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"max_tokens_per_gpu": 100}, "--max-tokens-per-gpu is ignored without --use-dynamic-batch-size"),
        ({"log_probs_max_tokens_per_gpu": 100}, "--log-probs-max-tokens-per-gpu is ignored"),
        ({"colocate": True, "rollout_num_gpus": 2}, "--rollout-num-gpus 2 is ignored: --colocate has 1"),
        ({"colocate": True}, ""),
        ({"no_load_optim": True}, "--no-load-optim is ignored without --load"),
        ({"no_load_optim": True, "load": "a"}, ""),
        ({}, ""),
    ],
)
def test_a_setting_without_effect_is_warned_of(
    settings: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        resolved(**settings)
    assert warning in caplog.text
    assert bool(caplog.records) == bool(warning)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, False),
        ({"use_kl_loss": True}, True),
        ({"kl_coef": 0.1}, True),
        ({"use_kl_loss": True, "loss_type": "sft_loss"}, False),
    ],
)
def test_a_reference_is_needed_where_kl_is_measured(settings: dict[str, Any], needed: bool) -> None:
    assert resolved(**settings).needs_reference is needed


def test_loaded_rollouts_need_neither_engines_nor_prompts() -> None:
    args = resolved(load_debug_rollout_data="{rollout_id}.json", prompt_data=None, rollout_num_gpus=None)
    assert args.debug_train_only and args.rollout_num_gpus == 0
    assert args.rollout_function_path == "slime.rollout.debug_data.generate_rollout"


def test_without_trainers_all_slots_are_the_engines() -> None:
    args = resolved(debug_rollout_only=True, rollout_num_gpus=3, actor_num_gpus_per_node=8, global_batch_size=2)
    assert (args.rollout_num_gpus, args.num_trainers, args.colocate) == (3, 3, True)


def test_details_are_both_dumps_below_one_folder() -> None:
    args = resolved(dump_details="/x")
    assert args.save_debug_rollout_data == "/x/rollout_data/{rollout_id}.json"
    assert args.save_debug_train_data == "/x/train_data/{rollout_id}_{rank}.npz"


def test_an_agent_generates_the_samples() -> None:
    assert resolved(agent_function_path="a.b").custom_generate_function_path == "slime.agent.generate.generate"


def test_experts_of_the_rollout_are_experts_that_are_kept() -> None:
    assert resolved(use_rollout_routing_replay=True).use_routing_replay
    assert resolved(use_rollout_routing_replay=True, use_rollout_logprobs=True).use_routing_replay
    assert not resolved().use_routing_replay
