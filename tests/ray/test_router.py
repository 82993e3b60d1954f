"""The real sglang-router in front of small servers that play the engine."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from aiohttp import web

from slime.arguments import Args
from slime.engine.spec import EngineCommand
from slime.ray.process_host import ProcessHost
from slime.ray.router import PortTaken, Router, ServerNotUp, not_up
from slime.utils import http_utils
from slime.utils.http_utils import HTTPError, find_free_port, get, post
from tests.helpers.tiny_models import make_tiny_model

HOST = "127.0.0.1"


@pytest_asyncio.fixture
async def router(tmp_path: Path) -> AsyncIterator[Router]:
    """A router that answers, ended with the test."""
    router = Router(Args(train_backend="fsdp"), host=HOST, log_dir=tmp_path)
    router.start()
    await router.wait_until_up()
    yield router
    router.stop()


@pytest_asyncio.fixture(autouse=True)
async def client() -> AsyncIterator[None]:
    """Closes the HTTP client of the test's event loop."""
    yield
    await http_utils.close()


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[str]:
    """The address of a server that answers /health, and /generate with its own address."""
    async with serving() as url:
        yield url


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """Such a server."""

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"text": url, "meta_info": {}, "bootstrap_port": body.get("bootstrap_port")})

    app = web.Application()
    app.router.add_get("/health", lambda _: asyncio.sleep(0, web.Response()))
    app.router.add_post("/generate", generate)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, HOST, find_free_port(HOST))
    await site.start()
    url = site.name
    yield url
    await runner.cleanup()


async def test_requests_reach_an_engine_from_its_registration_to_its_removal(router: Router, engine: str) -> None:
    assert await router.workers() == {}
    await router.add(engine)
    assert list(await router.workers()) == [engine]
    answer = await post(f"{router.url}/generate", {"text": "1+2="})
    assert answer["text"] == engine
    await router.remove(engine)
    async with asyncio.timeout(10):
        while await router.workers():
            await asyncio.sleep(0.05)
    await router.remove(engine)
    with pytest.raises(HTTPError) as caught:
        await post(f"{router.url}/generate", {"text": "1+2="}, retry_for_s=0)
    assert caught.value.status == 503


async def test_an_engine_that_is_registered_already_may_be_added_again(router: Router, engine: str) -> None:
    await router.add(engine)
    await router.add(engine)
    assert list(await router.workers()) == [engine]


async def test_a_router_that_dies_comes_back_on_its_port(router: Router, engine: str) -> None:
    url = router.url
    await router.add(engine)
    assert router.process is not None
    for child in psutil.Process(router.process._guard.pid).children():
        child.send_signal(signal.SIGKILL)
    async with asyncio.timeout(10):
        while router.process.poll() is None:
            await asyncio.sleep(0.05)
    assert not await router.is_up(timeout_s=1)
    router.start()
    await router.wait_until_up()
    assert router.url == url
    assert await router.workers() == {}


async def test_a_router_that_ends_at_its_start_shows_its_log(tmp_path: Path) -> None:
    args = Args(train_backend="fsdp", router_args=["--policy", "by_dice"])
    router = Router(args, host=HOST, log_dir=tmp_path)
    router.start()
    with pytest.raises(ServerNotUp, match=r"(?s)the router at http.* ended with code .* Its log ends:.*by_dice"):
        await router.wait_until_up()


async def test_an_engine_whose_port_was_taken_is_told_from_other_failures(tmp_path: Path) -> None:
    host = ProcessHost(str(tmp_path))
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        model = make_tiny_model(tmp_path / "model")
        command = [sys.executable, "-m", "slime.engine.embedded.server", "--model-path", str(model), "--port", port]
        assert host.start("engine_0", EngineCommand(command, {}), loopback=True).startswith(f"http://{HOST}:")
        async with asyncio.timeout(60):
            while (code := host.poll()) is None:
                await asyncio.sleep(0.05)
    error = not_up("engine_0", code, 60, host.log_tail())
    assert type(error) is PortTaken
    assert port in str(error)
    assert type(not_up("engine_0", 1, 60, "error: no model")) is ServerNotUp


async def test_an_external_router_is_talked_to_and_not_ended(router: Router, engine: str, tmp_path: Path) -> None:
    args = Args(train_backend="fsdp", sglang_router_ip=router.host, sglang_router_port=router.port)
    external = Router(args, host=HOST, log_dir=tmp_path)
    external.start()
    await external.wait_until_up()
    await external.add(engine)
    external.stop()
    assert list(await router.workers()) == [engine]
    assert await get(f"{router.url}/health") is not None


async def test_a_request_goes_to_an_engine_for_its_prompt_and_to_one_that_decodes(engine: str, tmp_path: Path) -> None:
    router = Router(Args(train_backend="fsdp", prefill_num_servers=1), host=HOST, log_dir=tmp_path)
    router.start()
    try:
        await router.wait_until_up()
        async with serving() as decode:
            await router.add(engine, role="prefill", bootstrap_port=9001)
            await router.add(decode, role="decode")
            answer = await post(f"{router.url}/generate", {"text": "1+2=", "sampling_params": {}})
            assert answer["text"] == decode
            assert answer["bootstrap_port"] == 9001
    finally:
        router.stop()
