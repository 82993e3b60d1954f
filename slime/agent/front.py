"""An OpenAI-compatible server in the rollout process, on a loopback port of its own: one base URL for each session.

    POST {base_url}/chat/completions    POST {base_url}/responses    GET {base_url}/models

with base_url = http://127.0.0.1:PORT/SESSION/v1.

It starts with the first session of an event loop and ends with the process. Streamed answers come in one piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import uuid
import weakref
from collections.abc import Coroutine, Iterator
from types import ModuleType
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from slime.agent import chat_completions, responses
from slime.agent.session import MODEL_NAME, BadRequest, Session
from slime.utils.http_utils import HTTPError

START_TIMEOUT_S = 30.0
BACKLOG = 4096
_HOST = "127.0.0.1"

_fronts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Front] = weakref.WeakKeyDictionary()
_starting: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


class Front:
    """The server and the sessions that are open."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._requests: dict[str, set[asyncio.Task[Any]]] = {}
        app = FastAPI(title="slime agent front", docs_url=None, redoc_url=None, openapi_url=None)
        for path, protocol in (("chat/completions", chat_completions), ("responses", responses)):
            route = functools.partial(self._answer, protocol)
            app.add_route(f"/{{name}}/v1/{path}", route, methods=["POST"])
        app.add_api_route("/{name}/v1/models", self._models, methods=["GET"], response_model=None)
        config = uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._listener = socket.create_server((_HOST, 0), backlog=BACKLOG)

    async def start(self) -> None:
        """Serve, until the process ends. Raises RuntimeError if that does not begin in time."""
        self._serving = asyncio.create_task(self._server.serve([self._listener]))
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while not self._server.started:
            if self._serving.done() or asyncio.get_running_loop().time() > deadline:
                raise RuntimeError(f"the front for agents did not begin to serve within {START_TIMEOUT_S:g} s")
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """End the server."""
        self._server.should_exit = True
        await self._serving

    @contextlib.contextmanager
    def serving(self, session: Session) -> Iterator[str]:
        """The base URL of `session`; afterwards it answers 404, and requests that are still open end with 410."""
        name = uuid.uuid4().hex
        self._sessions[name], self._requests[name] = session, set()
        try:
            yield f"http://{_HOST}:{self._listener.getsockname()[1]}/{name}/v1"
        finally:
            del self._sessions[name]
            for request in self._requests.pop(name):
                request.cancel()

    async def _models(self, name: str) -> Response:
        if name not in self._sessions:
            return _error("this session is over", 404)
        return JSONResponse({"object": "list", "data": [{"id": MODEL_NAME, "object": "model", "owned_by": "slime"}]})

    async def _answer(self, protocol: ModuleType, request: Request) -> Response:
        name = request.path_params["name"]
        session = self._sessions.get(name)
        if session is None:
            return _error("this session is over", 404)
        try:
            body = orjson.loads(await request.body())
        except orjson.JSONDecodeError as error:
            return _error(f"the body is not JSON ({error})", 400)
        if not isinstance(body, dict):
            return _error("the body must be an object", 400)
        try:
            answer = await self._within_session(name, protocol.complete(session, body))
        except BadRequest as error:
            return _error(str(error), 400)
        except HTTPError as error:
            return _error(str(error), 502)
        except asyncio.CancelledError:
            return _error("the session ended before the answer came", 410)
        if body.get("stream"):
            return StreamingResponse(protocol.events(answer), media_type="text/event-stream")
        return JSONResponse(answer)

    async def _within_session(self, name: str, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        task = asyncio.create_task(work)
        self._requests[name].add(task)
        task.add_done_callback(lambda done: self._requests.get(name, set()).discard(done))
        return await task


async def front_of_loop() -> Front:
    """The front of the running event loop, started if it is the first to ask."""
    loop = asyncio.get_running_loop()
    async with _starting.setdefault(loop, asyncio.Lock()):
        if loop not in _fronts:
            front = Front()
            await front.start()
            _fronts[loop] = front
    return _fronts[loop]


async def close_front() -> None:
    """End the front of the running event loop, if there is one."""
    front = _fronts.pop(asyncio.get_running_loop(), None)
    if front is not None:
        await front.stop()


def _error(message: str, status: int) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)
