"""What a rollout function returns, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slime.utils.types import Sample


@dataclass
class RolloutFnTrainOutput:
    """samples: one list of `Sample` for each prompt. metrics: extra scalars to log under their own names."""

    samples: list[list[Sample]]
    metrics: dict[str, Any] | None = None


@dataclass
class RolloutFnEvalOutput:
    """data: {dataset name: {"rewards": [...], "truncated": [...], "samples": [...]}}, lists of one length."""

    data: dict[str, dict[str, Any]]
    metrics: dict[str, Any] | None = None


RolloutFnOutput = RolloutFnTrainOutput | RolloutFnEvalOutput


def call_rollout_fn(fn: Callable[..., Any], *args: Any, evaluation: bool, **kwargs: Any) -> RolloutFnOutput:
    """`fn(*args, evaluation=evaluation, **kwargs)`, its output in the type that goes with `evaluation`.

    args: (args, rollout_id, data_source), passed by position: the third parameter may have any name.
    A bare list of groups (training) or a bare dict (evaluation) is wrapped. Raises ValueError for anything else.
    """
    output = fn(*args, **kwargs, evaluation=evaluation)
    name = getattr(fn, "__qualname__", repr(fn))
    if evaluation:
        if isinstance(output, dict):
            output = RolloutFnEvalOutput(output)
        if not isinstance(output, RolloutFnEvalOutput):
            raise ValueError(
                f"rollout function {name} with evaluation=True must return RolloutFnEvalOutput or its dict, "
                f"got {type(output).__name__}"
            )
        return output
    if isinstance(output, list):
        output = RolloutFnTrainOutput(output)
    if not isinstance(output, RolloutFnTrainOutput):
        raise ValueError(
            f"rollout function {name} must return RolloutFnTrainOutput or its list of groups, "
            f"got {type(output).__name__}"
        )
    _check_groups(output.samples, name)
    return output


def _check_groups(groups: list[Any], name: str) -> None:
    for number, group in enumerate(groups):
        if not isinstance(group, list):
            raise ValueError(
                f"rollout function {name} must return a list of groups, each a list of samples; "
                f"entry {number} is a {type(group).__name__}"
            )
