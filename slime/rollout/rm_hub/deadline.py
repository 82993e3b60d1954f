"""Calling a reward function that may hang or raise in this process: an async one, or any with --rm-num-workers 0."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache, partial
from typing import Any

from slime.rollout.rm_hub.errors import RewardError

MAX_THREADS = 64  # synchronous reward calls at a time; the others wait, their deadline not yet running


async def call_with_deadline(
    function: Callable[..., Any], *args: Any, name: str, sample_index: int | None, timeout_s: float, **kwargs: Any
) -> Any:
    """What `function(*args, **kwargs)` returns, awaited if it is async, else run in a thread of its own.

    A thread that overruns is left to itself: it is a daemon and holds up neither other rewards nor the end of the
    process. Raises RewardError if the function raises or does not return within `timeout_s` seconds.
    """
    call = partial(function, *args, **kwargs)
    try:
        if is_async(function):
            async with asyncio.timeout(timeout_s) as deadline:
                return await call()
        async with _thread_slots(asyncio.get_running_loop()), asyncio.timeout(timeout_s) as deadline:
            result = await _run_in_thread(call)
            return await result if inspect.isawaitable(result) else result
    except TimeoutError as error:
        reason = f"no reward within {timeout_s:g} s (--rm-timeout-s)" if deadline.expired() else "raised TimeoutError"
        raise RewardError(name, sample_index, reason) from error
    except RewardError:
        raise
    except Exception as error:  # a plug-in may raise anything; whatever it is fails this sample, by name
        raise RewardError(name, sample_index, f"raised {type(error).__name__}: {error}") from error


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling `function` gives a coroutine, as far as can be seen without calling it."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


@lru_cache(maxsize=8)
def _thread_slots(loop: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    """One limit for each event loop: a semaphore cannot serve two."""
    return asyncio.Semaphore(MAX_THREADS)


async def _run_in_thread(call: Callable[[], Any]) -> Any:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # from here on a deadline stops the waiting only, not the future

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name="reward", daemon=True).start()
    return await asyncio.wrap_future(future)
