"""Rules of runs that leave parts out, and of runs that check themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slime.config.base import flag_of
from slime.config.rules.base import require
from slime.config.run import RunConfig


def debug_rules(config: RunConfig) -> dict[str, Any]:
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
    require(
        config.load_debug_rollout_data_subsample is None or config.load_debug_rollout_data is not None,
        "--load-debug-rollout-data-subsample goes with --load-debug-rollout-data.",
    )
    require(
        config.memory_snapshot_num_steps is None or config.record_memory_history,
        "--memory-snapshot-num-steps has no effect without --record-memory-history: add it.",
    )
    if config.debug_rollout_only:
        require(
            not (config.debug_train_only or config.load_debug_rollout_data),
            "--debug-rollout-only has no trainers, --debug-train-only and --load-debug-rollout-data no engines.",
        )
        require(
            config.save is None, "--debug-rollout-only has nothing to save: drop --save, or name a --run-dir instead."
        )
        require(
            config.max_weight_staleness is None,
            "--debug-rollout-only knows one version of the weights: drop --max-weight-staleness.",
        )
        slots = config.num_trainers if config.colocate else config.rollout_num_gpus or 0
        require(slots > 0, "--rollout-num-gpus must be given and above 0, or --colocate.")
        # All slots are the engines': as in a colocated run in which trainers never start.
        changes |= {"colocate": True, "rollout_num_gpus": slots, "actor_num_nodes": 1, "actor_num_gpus_per_node": slots}
        changes |= {"critic_num_nodes": None, "critic_num_gpus_per_node": None, "keep_old_actor": False}
    return changes


def ci_rules(config: RunConfig) -> dict[str, Any]:
    """Checks a run makes of itself."""
    needing = ("ci_disable_kl_checker", "ci_save_grad_norm", "ci_load_grad_norm", "ci_metric_checker_key")
    given = [name for name in needing if getattr(config, name)]
    require(config.ci_test or not given, f"{', '.join(map(flag_of, given))}: has no effect without --ci-test: add it.")
    require(
        (config.ci_metric_checker_key is None) == (config.ci_metric_checker_threshold is None),
        "--ci-metric-checker-key and --ci-metric-checker-threshold go together.",
    )
    return {}
