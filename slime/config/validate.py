"""The rules between settings, and the settings that follow from others."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from slime.config.rollout import FULLY_ASYNC_ROLLOUT_FUNCTION
from slime.config.rules.algorithm import algorithm_rules
from slime.config.rules.base import check_prompt_fits, first, require
from slime.config.rules.batch import batch_rules, checkpoint_rules
from slime.config.rules.cluster import cluster_rules
from slime.config.rules.debug import ci_rules, debug_rules
from slime.config.rules.rollout import evaluate_rules, rollout_rules
from slime.config.run import RunConfig

RunT = TypeVar("RunT", bound=RunConfig)
# In this order: a rule may read what those before it have filled in.
_RULES = (
    debug_rules,
    ci_rules,
    cluster_rules,
    checkpoint_rules,
    batch_rules,
    algorithm_rules,
    rollout_rules,
    evaluate_rules,
)


def resolve(config: RunT) -> RunT:
    """`config` with every derived setting filled in. Raises ConfigError where settings contradict each other."""
    for rule in _RULES:
        config = replace(config, **rule(config))
    return config


def check_loop(config: RunConfig, *, is_async: bool) -> None:
    """Raise ConfigError where the settings do not go with the loop: that of train_async.py, or the synchronous one."""
    interval, bound = config.update_weights_interval, config.max_weight_staleness
    require(
        is_async or interval == 1,
        f"--update-weights-interval {interval} needs train_async.py: train.py updates after every rollout.",
    )
    require(
        not (is_async and config.colocate and not config.debug_rollout_only),
        "train_async.py samples while trainers train: give engines slots of their own (--rollout-num-gpus) and drop "
        "--colocate.",
    )
    require(
        not (is_async and config.true_on_policy_mode),
        "--true-on-policy-mode: train_async.py samples one rollout ahead of training. Use train.py.",
    )
    is_ahead = is_async or config.rollout_function_path == FULLY_ASYNC_ROLLOUT_FUNCTION
    require(
        not (is_ahead and config.keep_old_actor),
        "--keep-old-actor keeps one version of the weights, asynchronous rollouts are sampled by earlier ones: use "
        "--use-rollout-logprobs.",
    )
    require(
        not is_async or bound is None or bound >= interval,
        f"--max-weight-staleness {bound} cannot be held: train_async.py samples one rollout ahead, with weights that "
        f"are up to --update-weights-interval {interval} versions old.",
    )


def with_context(config: RunT, longest: int) -> RunT:
    """`config` with the contexts that are not given set to `longest`, the tokens that an engine takes.

    A prompt limit does not follow from it: a prompt that the user did not ask to leave out shall be an error.
    Raises ConfigError where a length that is given does not fit.
    """
    rollout_context = first(config.rollout_max_context_len, longest)
    eval_context = first(config.eval_max_context_len, rollout_context)
    require(
        rollout_context <= longest or config.debug_train_only,
        f"--rollout-max-context-len {rollout_context} is more than the {longest} tokens of the model or of "
        "--sglang-context-length.",
    )
    require(
        eval_context <= rollout_context,
        f"--eval-max-context-len {eval_context} is more than --rollout-max-context-len {rollout_context}: engines are "
        "started with the latter.",
    )
    check_prompt_fits("rollout", config.rollout_max_prompt_len, rollout_context)
    check_prompt_fits("eval", config.eval_max_prompt_len, eval_context)
    return replace(config, rollout_max_context_len=rollout_context, eval_max_context_len=eval_context)
