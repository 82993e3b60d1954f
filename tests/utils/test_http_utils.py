"""The HTTP client against real servers that answer, fail, hang, and go away."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from slime.utils import http_utils
from slime.utils.http_utils import HTTPError, delete, find_free_port, get, post

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Server:
    """Answers every request with the next of `handlers`, the last one again and again."""

    url: str = ""
    handlers: list[Handler] = field(default_factory=list)
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.headers.get("Authorization", ""), await request.read()))
        handler = self.handlers.pop(0) if len(self.handlers) > 1 else self.handlers[0]
        return await handler(request)


def answers(status: int = 200, text: str = '{"a": 1}') -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text)

    return handler


async def hangs_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def hangs(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    """A server on a free port."""
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", find_free_port())
    await site.start()
    server.url = site.name
    yield server
    await runner.cleanup()
    await http_utils.close()


async def test_post_sends_json_and_returns_json(server: Server) -> None:
    server.handlers = [answers()]
    assert await post(f"{server.url}/x", {"b": [1, 2]}, headers={"Authorization": "Bearer k"}) == {"a": 1}
    assert server.requests == [("POST", "Bearer k", b'{"b":[1,2]}')]


async def test_an_answer_that_is_no_json_is_text_and_an_empty_one_none(server: Server) -> None:
    server.handlers = [answers(text="OK"), answers(text="")]
    assert await get(server.url) == "OK"
    assert await delete(server.url) is None


@pytest.mark.parametrize("trouble", [answers(502), answers(503), answers(504), hangs_up])
async def test_a_lost_worker_is_tried_again(server: Server, trouble: Handler) -> None:
    server.handlers = [trouble, trouble, answers()]
    assert await post(server.url, {}) == {"a": 1}
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
async def test_a_refusal_is_raised_at_once_with_the_servers_words(server: Server, status: int) -> None:
    server.handlers = [answers(status, "the prompt is too long")]
    with pytest.raises(HTTPError, match=f"POST {server.url} answered {status}: the prompt is too long") as caught:
        await post(server.url, {})
    assert caught.value.status == status
    assert not caught.value.is_lost
    assert len(server.requests) == 1


async def test_trying_again_ends_at_its_deadline(server: Server) -> None:
    server.handlers = [answers(503)]
    start = time.monotonic()
    with pytest.raises(HTTPError, match="answered 503"):
        await post(server.url, {}, retry_for_s=0.3)
    assert time.monotonic() - start < 2
    assert len(server.requests) >= 2


async def test_a_server_that_hangs_is_lost_after_the_timeout(server: Server) -> None:
    server.handlers = [hangs]
    with pytest.raises(HTTPError, match=r"no answer within 0\.2 s") as caught:
        await post(server.url, {}, timeout_s=0.2)
    assert caught.value.is_lost
    assert len(server.requests) == 1


async def test_a_port_where_nobody_listens_is_lost() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        with pytest.raises(HTTPError, match="GET http") as caught:
            await get(url)
    assert caught.value.is_lost
    await http_utils.close()


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(HTTPError("no answer", 408)))
    assert (str(error), error.status, error.is_lost) == ("no answer", 408, True)


def test_two_event_loops_have_clients_of_their_own() -> None:
    async def session() -> object:
        client = http_utils._session()
        assert client is http_utils._session()
        await http_utils.close()
        return client

    assert asyncio.run(session()) is not asyncio.run(session())


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", find_free_port()))


def test_a_free_port_stays_below_what_is_asked_for() -> None:
    assert all(find_free_port(highest=20_500) <= 20_500 for _ in range(50))


FEW_FILES = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
from slime.utils.http_utils import max_connections, post

async def main():
    assert max_connections() == 144
    for url in sys.argv[1:]:
        answers = await asyncio.gather(*(post(url, {}, retry_for_s=0.0) for _ in range(300)))
        assert answers == [{"a": 1}] * 300
    urls = sys.argv[1:] * 200
    await asyncio.gather(*(post(url, {}, retry_for_s=0.0) for url in urls))

asyncio.run(main())
"""


async def test_more_requests_at_once_than_open_files_wait_whatever_the_number_of_servers() -> None:
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for _ in range(4):
            one = Server(handlers=[answers()])
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", one.handle)
            running = await stack.enter_async_context(TestServer(app))
            urls.append(str(running.make_url("/")))
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", FEW_FILES, *urls)
        async with asyncio.timeout(60):
            assert await process.wait() == 0


def test_a_client_leaves_a_tenth_of_the_open_files_and_256_at_least_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def bound(soft: int) -> int:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
        return http_utils.max_connections()

    assert [bound(soft) for soft in (20_000, 1024, 256)] == [18_000, 768, http_utils.LEAST_CONNECTIONS]
    assert bound(resource.RLIM_INFINITY) == bound(1_000_000) == http_utils.MOST_CONNECTIONS
