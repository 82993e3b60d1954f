"""Calling the plug-ins that look at samples, groups and metrics of a rollout."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from slime.rollout.data_source import DataSource
from slime.utils.misc import load_function
from slime.utils.types import Sample

Groups = list[list[Sample]]


async def run_sample_hooks(args: Any, sample: Sample, *, rollout_id: int | None, evaluation: bool) -> Sample:
    """`sample`, or what the functions of --rollout-sample-hook-path made of it, each called with the last one's.

    A hook gets `rollout_id` and `evaluation` where it has such parameters. Raises ValueError where one returns
    something else than a Sample or None.
    """
    known = {"rollout_id": rollout_id, "evaluation": evaluation}
    for path in args.rollout_sample_hook_path or []:
        function, names = _hook(path)
        output = function(args, sample, **{name: known[name] for name in names})
        if output is None:
            continue
        output = await output if inspect.isawaitable(output) else output
        if output is not None and not isinstance(output, Sample):
            raise ValueError(f"--rollout-sample-hook-path {path} must return a Sample or None, got {output!r:.80}")
        sample = output or sample
    return sample


@functools.lru_cache(maxsize=64)
def _hook(path: str) -> tuple[Callable[..., Any], frozenset[str]]:
    function = load_function(path)
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = frozenset({"rollout_id", "evaluation"})
    return function, names if takes_all else names & parameters.keys()


def filter_samples(args: Any, groups: Groups) -> None:
    """--rollout-sample-filter-path marks samples of `groups` that shall not be trained on."""
    if args.rollout_sample_filter_path is not None:
        load_function(args.rollout_sample_filter_path)(args, groups)


def process_all_samples(args: Any, all_groups: Groups, data_source: DataSource) -> None:
    """--rollout-all-samples-process-path looks at every finished group of a rollout."""
    if args.rollout_all_samples_process_path is not None:
        load_function(args.rollout_all_samples_process_path)(args, all_groups, data_source)


def logs_rollout_itself(
    args: Any, rollout_id: int, samples: list[Sample], *, extra_metrics: dict[str, Any], seconds: float
) -> bool:
    """Whether --custom-rollout-log-function-path has logged all there is to log of a rollout."""
    path = args.custom_rollout_log_function_path
    return path is not None and bool(load_function(path)(rollout_id, args, samples, extra_metrics, seconds))


def logs_eval_itself(
    args: Any, rollout_id: int, data: dict[str, dict[str, Any]], extra_metrics: dict[str, Any]
) -> bool:
    """Whether --custom-eval-rollout-log-function-path has logged all there is to log of an evaluation."""
    path = args.custom_eval_rollout_log_function_path
    return path is not None and bool(load_function(path)(rollout_id, args, data, extra_metrics))
