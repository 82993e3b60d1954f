"""Ending a rollout early: engines answer with what they have, nothing is scored any more, nothing hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from slime.rollout.engines import ANSWER_S, engine_urls
from slime.rollout.state import GenerateState
from slime.utils.http_utils import HTTPError, post
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

AGAIN_S = 0.5  # a request that was on its way, or a next turn, arrives after the engines were told
SCORING_S = 1.0  # for rewards that are nearly there: a synchronous one that is cancelled costs its process


async def abort(args: Any, rollout_id: int | None, *, state: GenerateState) -> list[list[Sample]]:
    """End the tasks of `state.pendings` and return their groups, in the order of their places.

    Unfinished samples are ABORTED with the tokens they have, finished ones whose reward was still to come have none.
    A generation function that does not end within --rollout-abort-timeout-s is cancelled, its sample set back to its
    prompt, or to the last turn of its conversation. Ends every request at the engines, whoever sent it. Raises
    TimeoutError if a task ignores being cancelled.
    """
    state.is_aborted = True
    started, patience_s = time.monotonic(), args.rollout_abort_timeout_s
    pending = set(state.pendings)
    while pending:
        await _abort_engines(args)
        _, pending = await asyncio.wait(pending, timeout=min(AGAIN_S, patience_s))
        waited_s = time.monotonic() - started
        if waited_s > SCORING_S:
            for task in list(state.scoring):
                task.cancel()
        if pending and waited_s > patience_s:
            _cancel_generation(state, rollout_id)
        if pending and waited_s > SCORING_S + 2 * patience_s:
            raise TimeoutError(
                f"{len(pending)} groups of rollout {rollout_id} do not end, {waited_s:.0f} s after they were told to: "
                "a plug-in holds them and ignores being cancelled"
            )
    groups = [task.result() for task in sorted(state.pendings, key=state.pendings.__getitem__)]
    state.pendings.clear()
    return groups


def _cancel_generation(state: GenerateState, rollout_id: int | None) -> None:
    logger.warning(
        "rollout %s: %d generation functions did not end within --rollout-abort-timeout-s; their samples start over",
        rollout_id,
        len(state.generating),
    )
    for task in list(state.generating):
        task.cancel()


async def _abort_engines(args: Any) -> None:
    """Tell every engine to end every request. One that does not answer is told again by the next call."""
    headers = {"Authorization": f"Bearer {args.sglang_api_key}"} if args.sglang_api_key else {}
    answers = await asyncio.gather(
        *(
            post(f"{url}/abort_request", {"abort_all": True}, timeout_s=ANSWER_S, retry_for_s=0.0, headers=headers)
            for url in await engine_urls(args)
        ),
        return_exceptions=True,
    )
    for answer in answers:
        if isinstance(answer, HTTPError):
            logger.warning("an engine did not take the order to end its requests: %s", answer)
        elif isinstance(answer, BaseException):
            raise answer
