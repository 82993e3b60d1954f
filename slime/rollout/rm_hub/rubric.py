"""Scoring by verifiers, whose package need not be installed here: a Rubric before its release 0.3, a Task since."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from functools import lru_cache
from typing import Any, NamedTuple

from slime.utils.misc import load_function


class Score(NamedTuple):
    """The weighted sum, and the value of each function by its name."""

    reward: float
    metrics: dict[str, float]


class TaskKind(NamedTuple):
    """A subclass of verifiers' Task, whose methods score, and the configuration of its taskset (None: its default)."""

    task_type: Any
    config: Any


def score(path: str, states: list[dict[str, Any]], *, as_group: bool) -> Awaitable[list[Score]]:
    """The scores of finished rollouts. Not async itself: it is for a worker process, as a rubric's functions may block.

    path: names a Rubric, an Environment, a Task, a Taskset, or a function without arguments that returns an
        Environment or a Taskset (`load_environment`).
    states: prompt, completion, answer, info and task of each, and columns, of which a Task's data are made.
    as_group: all in one call, for functions of groups, which only a Rubric has.
    """
    scorer = scorer_at(path)
    if isinstance(scorer, TaskKind):
        return _score_tasks(scorer, states)
    return _score(scorer, states, as_group)


async def _score(rubric: Any, states: list[dict[str, Any]], as_group: bool) -> list[Score]:
    full = [
        {"trajectory": [], "metrics": {}, "reward": None, "timing": {"scoring_ms": 0.0, "total_ms": 0.0}, **state}
        for state in states
    ]
    if as_group:
        await _call(rubric.score_group, full)
    else:
        for state in full:
            await _call(rubric.score_rollout, state)
    return [Score(float(state["reward"]), dict(state["metrics"])) for state in full]


@lru_cache(maxsize=64)
def scorer_at(path: str) -> Any:
    """The rubric, or the kind of tasks, that `path` leads to. Raises ValueError where it leads to none."""
    found = load_function(path)
    if _is_task(found):
        return TaskKind(found, None)
    if inspect.isclass(found) and hasattr(found, "task_type"):
        return TaskKind(found.task_type(), None)
    if inspect.isfunction(found) or inspect.isclass(found):
        found = found()
    taskset = getattr(found, "taskset", found)
    if hasattr(taskset, "task_type"):
        return TaskKind(type(taskset).task_type(), getattr(getattr(taskset, "config", None), "task", None))
    if not hasattr(found, "score_rollout"):
        found = getattr(found, "rubric", None)
    if not hasattr(found, "score_rollout"):
        raise ValueError(
            f"{path} leads to nothing of verifiers that scores: it must be a Rubric, an Environment, a Task or a "
            "Taskset, or return one"
        )
    return found


def _is_task(found: Any) -> bool:
    return inspect.isclass(found) and hasattr(found, "data_type") and hasattr(found, "score")


async def _call(method: Any, states: Any) -> None:
    """Releases differ in whether they take a semaphore."""
    extra = {"score_sem": asyncio.Semaphore(64)} if "score_sem" in inspect.signature(method).parameters else {}
    await method(states, **extra)


async def _score_tasks(kind: TaskKind, states: list[dict[str, Any]]) -> list[Score]:
    scores = []
    for state in states:
        task = _task(kind, state)
        trace = _trace(task, state)
        await task.score(trace)
        values = {name: float(value) for name, value in trace.metrics.items() if value is not None}
        values |= {name: float(reward.score) for name, reward in trace.rewards.items() if reward is not None}
        scores.append(Score(float(trace.reward), values))
    return scores


def _task(kind: TaskKind, state: dict[str, Any]) -> Any:
    """The task with the data of the sample. Raises ValueError where these are not its data, or it scores otherwise."""
    from pydantic import ValidationError

    data_type, name = kind.task_type.data_type(), kind.task_type.__name__
    try:
        data = data_type(**{"answer": state["answer"], **state["columns"], "prompt": state["prompt"]})
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"the sample is no {data_type.__name__}: {place}: {wrong['msg']}") from error
    task = kind.task_type(data, kind.config)
    scoring = [*task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    if not scoring:
        raise ValueError(f"{name} has no reward")
    for function in scoring:
        runtime = inspect.signature(function).parameters.get("runtime")
        if runtime is not None and runtime.default is inspect.Parameter.empty:
            raise ValueError(f"{name}.{function.__name__} needs a runtime of verifiers, there is none here")
    return task


def _trace(task: Any, state: dict[str, Any]) -> Any:
    """The conversation as verifiers records it: prompt, then what was sampled."""
    from verifiers.v1.state import state_cls
    from verifiers.v1.trace import Trace

    prompt, completion = (
        _messages(state[key], role) for key, role in (("prompt", "user"), ("completion", "assistant"))
    )
    nodes = [
        {"message": message, "parent": number - 1 if number else None, "sampled": number >= len(prompt)}
        for number, message in enumerate([*prompt, *completion])
    ]
    trace = Trace.model_validate(
        {
            "task": {"type": type(task).__name__, "data": task.data},
            "agent": {"config": {}},
            "nodes": nodes,
            "is_completed": True,
            "ok": True,
        }
    )
    trace.state = state_cls(type(task))()
    return trace


def _messages(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value
