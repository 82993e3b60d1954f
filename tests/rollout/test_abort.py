"""What `abort` tells the engines, and what it does about those who do not listen."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from slime.rollout.abort import abort
from slime.rollout.state import GenerateState
from slime.utils.http_utils import close, find_free_port
from slime.utils.types import Sample


class Wire:
    """A router and an engine in one server; `ended` is set by the first order to end every request."""

    def __init__(self, *dead_engines: str) -> None:
        self.dead_engines = dead_engines
        self.orders: list[tuple[str | None, Any]] = []
        self.ended = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/workers", self.workers)
        app.router.add_post("/abort_request", self.abort_request)
        return app

    async def workers(self, request: web.Request) -> web.Response:
        urls = [*self.dead_engines, f"http://{request.host}"]
        return web.json_response({"workers": [{"url": url} for url in urls]})

    async def abort_request(self, request: web.Request) -> web.Response:
        self.orders.append((request.headers.get("Authorization"), await request.json()))
        self.ended.set()
        return web.Response()


def settings(server: TestServer, patience_s: float = 10.0) -> Any:
    return SimpleNamespace(
        sglang_router_ip="127.0.0.1",
        sglang_router_port=server.port,
        sglang_api_key="secret",
        rollout_abort_timeout_s=patience_s,
    )


def state_of(*tasks: asyncio.Task[Any]) -> Any:
    pendings = {task: len(tasks) - place for place, task in enumerate(tasks)}
    return SimpleNamespace(pendings=pendings, is_aborted=False, generating=set(), scoring=set())


async def test_every_engine_is_told_with_the_key_though_another_one_is_dead() -> None:
    wire = Wire(f"http://127.0.0.1:{find_free_port()}")
    async with TestServer(wire.app()) as server:

        async def answers_when_told(index: int) -> list[Sample]:
            await wire.ended.wait()
            return [Sample(index=index)]

        state = state_of(*(asyncio.create_task(answers_when_told(index)) for index in range(3)))
        groups = await abort(settings(server), 0, state=state)
        await close()
    assert wire.orders[0] == ("Bearer secret", {"abort_all": True})
    assert [group[0].index for group in groups] == [2, 1, 0]  # by place
    assert state.is_aborted
    assert not state.pendings


async def test_a_reward_that_is_nearly_there_is_waited_for_and_another_one_is_not() -> None:
    wire = Wire()
    async with TestServer(wire.app()) as server:
        state = GenerateState.__new__(GenerateState)
        state.is_aborted, state.generating, state.scoring = False, set(), set()

        async def scored_when(event: asyncio.Event) -> list[Sample]:
            sample = Sample()
            with state.interruptible(state.scoring):
                await event.wait()
                sample.reward = 1.0
            return [sample]

        events = [wire.ended, asyncio.Event()]
        state.pendings = {asyncio.create_task(scored_when(event)): place for place, event in enumerate(events)}
        await asyncio.sleep(0)
        groups = await abort(settings(server), 0, state=state)
        await close()
    assert [group[0].reward for group in groups] == [1.0, None]


async def test_a_plug_in_that_ignores_being_cancelled_is_an_error_and_no_hang() -> None:
    wire, release = Wire(), asyncio.Event()
    async with TestServer(wire.app()) as server:

        async def stubborn() -> list[Sample]:
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()
            return []

        task = asyncio.create_task(stubborn())
        state = state_of(task)
        state.generating = {task}
        with pytest.raises(TimeoutError, match="1 groups of rollout 4 do not end, .* ignores being cancelled"):
            await abort(settings(server, 0.05), 4, state=state)
        release.set()
        await task
        await close()
