"""How responses are sampled."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from slime.config.base import Group, arg, check, check_not_negative, check_positive

DEFAULT_ROLLOUT_FUNCTION = "slime.rollout.sglang_rollout.generate_rollout"
FULLY_ASYNC_ROLLOUT_FUNCTION = "slime.rollout.fully_async_rollout.generate_rollout_fully_async"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Group):
    """Rollout: engines, sampling parameters and the functions that may be replaced."""

    hf_checkpoint: str = arg("", "Hugging Face directory: tokenizer, engine start, and the trainer's first weights.")
    trust_remote_code: bool = arg(False, "Let Python code that comes with the checkpoint run.")
    rollout_engine: Literal["auto", "sglang", "embedded"] = arg(
        "auto", "What samples: auto is SGLang on GPUs where it is installed, else the embedded engine."
    )
    sglang_python: str | None = arg(None, "The Python that has SGLang (default: the one that runs slime).")
    prefill_num_servers: int | None = arg(
        None, "Engines that compute prompts only; the others take them over and decode (SGLang's PD disaggregation)."
    )
    sglang_config: str | None = arg(
        None, "YAML file of several models and groups of engines, each with SGLang settings of its own."
    )
    rollout_external_engine_addrs: list[str] | None = arg(
        None, "HOST:PORT of engines that somebody else has started: given weights and requests, never ended."
    )
    rollout_function_path: str = arg(DEFAULT_ROLLOUT_FUNCTION, "The function that turns prompts into scored samples.")
    custom_generate_function_path: str | None = arg(None, "Replaces the generation of one sample only.")
    agent_function_path: str | None = arg(
        None, "f(base_url, sample) -> reward or None: an agent that talks to an OpenAI-compatible server."
    )
    agent_timeout_s: float = arg(1800.0, "Deadline of one run of that agent, in seconds.")
    rollout_batch_size: int | None = arg(None, "Prompts of one rollout (required).")
    n_samples_per_prompt: int = arg(1, "Responses sampled for each prompt: the group.")
    over_sampling_batch_size: int | None = arg(
        None, "Prompts started at once; the first --rollout-batch-size groups to finish are kept (default: that many)."
    )
    dynamic_sampling_filter_path: str | None = arg(
        None,
        "f(args, samples, **kw) -> DynamicFilterOutput | bool: whether a group is kept; others are sampled for it.",
    )
    dynamic_sampling_max_drop_ratio: float = arg(
        50.0, "Groups that the filter may drop for each one of --rollout-batch-size before the run stops."
    )
    partial_rollout: bool = arg(
        False, "Keep what is unfinished when a rollout is complete; the next one goes on with it."
    )
    mask_offpolicy_in_partial_rollout: bool = arg(
        False, "Of a response that was interrupted train only on the tokens that its last rollout sampled."
    )
    rollout_abort_timeout_s: float = arg(
        60.0, "Seconds that generation functions have to end when a rollout is complete; then they start over later."
    )
    rollout_sample_hook_path: list[str] | None = arg(
        None,
        "f(args, sample, *, rollout_id, evaluation) -> Sample | None, async or not: called with scored samples.",
        repeats=True,
    )
    rollout_sample_filter_path: str | None = arg(
        None, "f(args, groups) -> None: sets sample.remove_sample where a sample shall not be trained on."
    )
    custom_config_path: str | None = arg(
        None, "YAML or TOML file whose keys win over all flags; those of no setting are --plugin-settings."
    )
    plugin_settings: dict[str, Any] = arg({}, "JSON: settings of your plug-ins, which read them as args.KEY.")
    rollout_all_samples_process_path: str | None = arg(
        None, "f(args, all_groups, data_source) -> None: sees every group of a rollout, dropped ones too."
    )
    num_rollout: int | None = arg(None, "Rollouts in all. This or --num-epoch is required; this wins.")
    num_epoch: int | None = arg(None, "Passes over the prompt data, instead of --num-rollout.")
    start_rollout_id: int | None = arg(None, "First rollout (default: the one after the loaded checkpoint).")
    rollout_temperature: float = arg(1.0, "Sampling temperature; log-probs of training are divided by it too.")
    rollout_top_p: float = arg(1.0, "Nucleus sampling.")
    rollout_top_k: int = arg(-1, "Sample among the k most likely tokens; -1: all.")
    rollout_max_context_len: int | None = arg(None, "Longest prompt + response, in tokens (default: the model's).")
    rollout_max_prompt_len: int | None = arg(
        None,
        "Longer prompts are left out (default: --rollout-max-context-len - 1 where that is given; without either a "
        "prompt longer than the context is an error).",
    )
    rollout_max_response_len: int = arg(1024, "Longest response, in tokens.")
    rollout_skip_special_tokens: bool = arg(False, "Leave special tokens out of `Sample.response`.")
    rollout_stop: list[str] | None = arg(None, "Strings that end a response.")
    rollout_stop_token_ids: list[int] | None = arg(None, "Token ids that end a response.")
    rollout_seed: int = arg(42, "Seed of the prompt order and of every sampled token.")
    sglang_server_concurrency: int = arg(512, "Requests in flight per engine.")
    sglang_router_ip: str | None = arg(None, "Address of an external router; with --sglang-router-port.")
    sglang_router_port: int | None = arg(None, "Port of an external router.")
    sglang_router_request_timeout_secs: int = arg(14400, "Deadline of one request through the router, in seconds.")
    sglang_api_key: str | None = arg(None, "Key that engines ask for (default: none on one node, else a random one).")
    sglang_args: list[str] = arg([], "Engine flags that came as --sglang-X, passed on without the prefix.")
    router_args: list[str] = arg([], "Router flags that came as --router-X, passed on without the prefix.")
    update_weight_transport: Literal["auto", "disk", "tensor", "distributed", "nccl"] = arg(
        "auto",
        "How weights reach the engines: files, memory of the GPUs that both use, or a broadcast, also called nccl "
        "(auto, with SGLang on GPUs: such memory with --colocate and one GPU an engine, a broadcast to engines that "
        "slime starts on other GPUs; else files).",
    )
    update_weight_disk_dir: str | None = arg(
        None, "Where the disk transport writes (default: the memory file system on one node, else the run directory)."
    )
    update_weight_disk_keep_files: bool = arg(
        False, "Keep all versions below --update-weight-disk-dir, also after the run: all the weights each time."
    )
    custom_update_weight_post_write_path: str | None = arg(
        None,
        "f(args, version_dir, rollout_engines) -> None: called where a version was written, before engines load it.",
    )
    update_weight_buffer_size: int = arg(512 * 2**20, "Bytes gathered at once when weights are sent or exported.")
    check_weight_update_equal: bool = arg(False, "After each update compare checksums of all tensors on both sides.")
    update_weights_interval: int = arg(1, "Rollouts between two weight updates; more than 1 with train_async.py only.")
    true_on_policy_mode: bool = arg(
        False,
        "Train on nothing but what the current policy sampled: one optimizer step a rollout, and the run stops at a "
        "sample of other weights. Engines may still round differently: see train/train_rollout_logprob_abs_diff.",
    )
    max_weight_staleness: int | None = arg(
        None,
        "Versions by which the weights that sampled may be older than those that train (default: no bound; fully "
        "asynchronous rollouts begin groups at most 2 versions ahead).",
    )
    stale_samples: Literal["refresh", "drop"] = arg(
        "refresh", "Groups beyond --max-weight-staleness: sample their prompts anew later, or leave them out."
    )
    use_fault_tolerance: bool = arg(True, "Restart engines and router that die or hang.")
    rollout_health_check_interval: float = arg(5.0, "Seconds between two looks at each engine and the router.")
    rollout_health_check_timeout: float = arg(30.0, "Seconds for an answer before an engine counts as hanging.")
    rollout_health_check_first_wait: float = arg(
        0.0, "Seconds after an engine's start in which it may hang, to compile say; its end is noticed at once."
    )
    max_engine_restarts: int = arg(10, "Restarts of engines and router in all before the run stops.")

    def __post_init__(self) -> None:
        check_positive(self, "rollout_batch_size", "n_samples_per_prompt", "num_rollout", "num_epoch")
        check_positive(self, "over_sampling_batch_size", "rollout_abort_timeout_s", "dynamic_sampling_max_drop_ratio")
        check_positive(self, "rollout_temperature", "rollout_max_response_len", "rollout_max_context_len")
        check_positive(self, "rollout_max_prompt_len", "sglang_server_concurrency", "update_weight_buffer_size")
        check_positive(self, "agent_timeout_s", "rollout_health_check_interval", "rollout_health_check_timeout")
        check_not_negative(self, "start_rollout_id", "max_engine_restarts", "rollout_seed", "max_weight_staleness")
        check_positive(self, "update_weights_interval", "prefill_num_servers")
        check_not_negative(self, "rollout_health_check_first_wait")
        check(0 < self.rollout_top_p <= 1, "rollout_top_p", "above 0 and at most 1", self.rollout_top_p)
        check(self.rollout_top_k == -1 or self.rollout_top_k > 0, "rollout_top_k", "-1 or above 0", self.rollout_top_k)
        own = {item.name for item in fields(self)} | set(dir(type(self)))
        taken = [key for key in self.plugin_settings if not key.isidentifier() or key in own]
        check(not taken, "plugin_settings", "names that slime does not use", ", ".join(taken))
        super().__post_init__()
