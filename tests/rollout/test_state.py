"""What the requests of a rollout share."""

from __future__ import annotations

import asyncio
import gc
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from slime.rollout import state
from slime.rollout.state import GenerateState, Interruptible, max_in_flight, rare_collection


def engines(number: int, concurrency: int) -> Any:
    return SimpleNamespace(num_engines=number, sglang_server_concurrency=concurrency)


def test_every_engine_gets_its_share_of_the_requests_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "max_connections", lambda: 100_000)
    assert max_in_flight(engines(64, 513)) == 64 * 513
    assert max_in_flight(engines(0, 513)) == 513  # engines that others started


def test_fewer_requests_are_in_flight_where_files_are_few_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state, "max_connections", lambda: 1_000)
    with caplog.at_level(logging.WARNING):
        assert [max_in_flight(engines(64, 511)) for _ in range(3)] == [968] * 3
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "968 requests at once, not 32704, as --sglang-server-concurrency would have it"
    ]


def test_objects_from_before_a_rollout_are_not_looked_at_in_it_and_are_again_after_it() -> None:
    before = gc.get_threshold()
    with rare_collection(engines(64, 100)):
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[0] == 64 * 100 * state.OBJECTS_PER_REQUEST
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == before


async def interrupted(*, is_aborted: bool) -> str:
    """What a task says whose block was cancelled."""
    shared = GenerateState.__new__(GenerateState)
    shared.is_aborted, stage = False, set[asyncio.Task[Any]]()

    async def work() -> str:
        with Interruptible(shared, stage):
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return "went on"

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    assert stage == {task}
    shared.is_aborted = is_aborted
    task.cancel()
    await asyncio.wait([task])
    assert not stage
    return "cancelled" if task.cancelled() else task.result()


async def test_a_block_that_abort_cancels_ends_and_the_task_goes_on() -> None:
    assert await interrupted(is_aborted=True) == "went on"


async def test_a_block_that_somebody_else_cancels_takes_its_task_with_it() -> None:
    assert await interrupted(is_aborted=False) == "cancelled"
