"""Running coroutines from synchronous code."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def _background_loop() -> asyncio.AbstractEventLoop:
    """One event loop a process, in a thread of its own, so that HTTP connections outlive a single `run`."""
    import uvloop

    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, name="slime-asyncio", daemon=True).start()
    return loop


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Begins `coroutine` in the process's background event loop."""
    return asyncio.run_coroutine_threadsafe(coroutine, _background_loop())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of `coroutine`, run in the process's background event loop; KeyboardInterrupt cancels it."""
    future = submit(coroutine)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Begins `function`, which may never return, in a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def call() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(function())
        except BaseException as error:  # handed to whoever waits, without the frames: they hold what was worked on
            future.set_exception(error.with_traceback(None))

    threading.Thread(target=call, name="slime-call", daemon=True).start()
    return future
