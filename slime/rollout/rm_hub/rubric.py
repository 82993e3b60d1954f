"""Scoring with a rubric of verifiers (0.1.8 and later 0.1 releases), whose package need not be installed here."""

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


def score(path: str, states: list[dict[str, Any]], *, as_group: bool) -> Awaitable[list[Score]]:
    """The scores of finished rollouts. Not async itself: it is for a worker process, as a rubric's functions may block.

    path: names a Rubric, an Environment, or a function without arguments that returns one (`load_environment`).
    states: prompt, completion, answer, info and task of each. as_group: all in one call, for functions of groups.
    """
    return _score(rubric_at(path), states, as_group)


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
def rubric_at(path: str) -> Any:
    """The rubric that `path` leads to. Raises ValueError where it leads to none."""
    found = load_function(path)
    if inspect.isfunction(found) or inspect.isclass(found):
        found = found()
    if not hasattr(found, "score_rollout"):
        found = getattr(found, "rubric", None)
    if not hasattr(found, "score_rollout"):
        raise ValueError(f"{path} leads to no rubric of verifiers: it must be one, an Environment, or return one")
    return found


async def _call(method: Any, states: Any) -> None:
    """Releases differ in whether they take a semaphore."""
    extra = {"score_sem": asyncio.Semaphore(64)} if "score_sem" in inspect.signature(method).parameters else {}
    await method(states, **extra)
