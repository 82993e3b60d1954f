"""Coroutines from synchronous code."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from slime.utils.async_utils import run


async def _current_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_run_returns_the_result_and_raises_the_error() -> None:
    async def double(value: int) -> int:
        await asyncio.sleep(0)
        if value < 0:
            raise ValueError("negative")
        return 2 * value

    assert run(double(2)) == 4
    with pytest.raises(ValueError, match="negative"):
        run(double(-1))


def test_every_run_uses_one_loop_in_a_thread_of_its_own() -> None:
    with ThreadPoolExecutor(4) as pool:
        loops = set(pool.map(lambda _: run(_current_loop()), range(8)))
    assert len(loops) == 1

    async def thread_name() -> str:
        return threading.current_thread().name

    assert run(thread_name()) == "slime-asyncio"


def test_calls_from_two_threads_run_side_by_side() -> None:
    both = asyncio.Barrier(2)

    async def meet() -> bool:
        async with asyncio.timeout(10):
            await both.wait()
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: run(meet()), range(2))) == [True, True]
