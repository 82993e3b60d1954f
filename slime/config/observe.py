"""What is recorded of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.base import Group, arg, check, check_positive, check_template


@dataclass(frozen=True, kw_only=True)
class ObserveConfig(Group):
    """Observation: run directory, trackers, debugging."""

    run_dir: str | None = arg(None, "Metrics, samples, logs and report go here (default: --save, else runs/DATE-TIME).")
    dry_run: bool = arg(False, "Check everything that can be checked without a cluster, print the plan, and end.")
    debug_train_only: bool = arg(False, "No engines: the rollout function brings complete samples, as SFT does.")
    debug_rollout_only: bool = arg(False, "No trainers: engines sample from --hf-checkpoint, nothing is learned.")
    save_debug_rollout_data: str | None = arg(
        None, "Write the samples of each rollout to this path; {rollout_id} is filled in."
    )
    load_debug_rollout_data: str | None = arg(
        None, "Train on the rollouts in these files, saved with the flag above; no engines, as --debug-train-only."
    )
    load_debug_rollout_data_subsample: float | None = arg(
        None, "Train on this share of the groups in each of these files, spread over the file; above 0, at most 1."
    )
    save_debug_train_data: str | None = arg(
        None, "Write what each rank trained on to this path (.npz); {rollout_id} and {rank} are filled in."
    )
    dump_details: str | None = arg(None, "Folder for both of these, rollout_data/ and train_data/; for slime replay.")
    log_level: Literal["debug", "info", "warning"] = arg("info", "Level of slime's own log.")
    custom_rollout_log_function_path: str | None = arg(
        None, "f(rollout_id, args, samples, rollout_extra_metrics, rollout_time) -> bool; True: nothing else is logged."
    )
    custom_eval_rollout_log_function_path: str | None = arg(
        None, "f(rollout_id, args, data, extra_metrics) -> bool, for evaluations; True: nothing else is logged."
    )
    log_passrate: bool = arg(False, "Log pass@k of the rollout's groups, as rollout/pass@k.")
    log_multi_turn: bool = arg(False, "Log turns and tool tokens of the rollout's samples, as rollout/multi_turn/*.")
    log_correct_samples: bool = arg(False, "Log lengths of samples with reward 1 or more, as rollout/correct/*.")
    log_reward_category: str | None = arg(
        None, "Key of the reward dict that says why: shares of its values are logged, as rollout/error_cat/VALUE."
    )
    ci_test: bool = arg(
        False,
        "Stop with an error where a number of the run is wrong: the KL of the first step must be 0, and as below.",
    )
    ci_disable_kl_checker: bool = arg(False, "Leave the KL of the first step out.")
    ci_train_rollout_logprob_abs_diff_threshold: float = arg(
        0.1, "Largest mean difference of log-probs between trainer and engine, in every step."
    )
    ci_save_grad_norm: str | None = arg(
        None, "Write the gradient norm to this file, as JSON; {rollout_id} is filled in."
    )
    ci_load_grad_norm: str | None = arg(None, "Compare it with what another run wrote there; 1% may differ.")
    ci_metric_checker_key: str | None = arg(None, "A metric, such as eval/NAME, that must once have reached ...")
    ci_metric_checker_threshold: float | None = arg(None, "... this value when the run ends.")
    use_pytorch_profiler: bool = arg(False, "Write traces of trainers to RUN_DIR/profile, for https://ui.perfetto.dev.")
    profile_target: list[Literal["train_overall", "train_actor", "train_log_probs"]] = arg(
        ["train_overall"], "What is traced: all of a rollout's training, its optimizer steps, its log-probs."
    )
    profile_step_start: int = arg(10, "First rollout that is traced.")
    profile_step_end: int = arg(12, "The rollout before which tracing ends.")
    record_memory_history: bool = arg(
        False, "Record allocations on trainers' GPUs; written when memory runs out, for https://pytorch.org/memory_viz."
    )
    memory_snapshot_dir: str | None = arg(None, "Where to (default: RUN_DIR/memory).")
    memory_snapshot_num_steps: int | None = arg(None, "Write them also after this many rollouts.")
    use_tensorboard: bool = arg(False, "Write TensorBoard events.")
    tb_project_name: str | None = arg(None, "Folder of the events (default: RUN_DIR/tensorboard).")
    tb_experiment_name: str | None = arg(None, "Folder below it.")
    use_wandb: bool = arg(False, "Log to Weights & Biases.")
    wandb_mode: Literal["online", "offline", "disabled"] | None = arg(None, "How wandb works (default: its own).")
    wandb_dir: str | None = arg(None, "Folder of wandb's files (default: RUN_DIR).")
    wandb_key: str | None = arg(None, "API key (default: WANDB_API_KEY).")
    wandb_host: str | None = arg(None, "Address of a private server.")
    wandb_team: str | None = arg(None, "Team (entity).")
    wandb_group: str | None = arg(None, "Group, and start of the run's name.")
    wandb_project: str | None = arg(None, "Project.")
    wandb_run_id: str | None = arg(None, "Run to continue.")
    wandb_random_suffix: bool = arg(
        True, "Add a random suffix to the run's name.", disable="--disable-wandb-random-suffix"
    )
    wandb_always_use_train_step: bool = arg(False, "Use train/step as the axis of everything.")

    def __post_init__(self) -> None:
        check_template(self, "save_debug_rollout_data", "rollout_id")
        check_template(self, "load_debug_rollout_data", "rollout_id")
        check_template(self, "save_debug_train_data", "rollout_id", "rank")
        check_template(self, "ci_save_grad_norm", "rollout_id")
        check_template(self, "ci_load_grad_norm", "rollout_id")
        threshold = self.ci_train_rollout_logprob_abs_diff_threshold
        check(threshold > 0, "ci_train_rollout_logprob_abs_diff_threshold", "above 0", threshold)
        share = self.load_debug_rollout_data_subsample
        check(share is None or 0 < share <= 1, "load_debug_rollout_data_subsample", "above 0 and at most 1", share)
        check_positive(self, "memory_snapshot_num_steps")
        start, end = self.profile_step_start, self.profile_step_end
        check(0 <= start < end, "profile_step_end", f"above --profile-step-start {start}, which is 0 or more", end)
        super().__post_init__()
