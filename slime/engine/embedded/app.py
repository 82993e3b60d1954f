"""The engine behind its HTTP application."""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from transformers import AutoTokenizer

from slime.engine.embedded.admin import Admin
from slime.engine.embedded.args import ServerArgs
from slime.engine.embedded.engine import Engine
from slime.engine.embedded.generation import ERROR_STATUS, Generator, error_body, json_response
from slime.engine.embedded.model_runner import eos_token_ids
from slime.engine.embedded.openai import OpenAI
from slime.engine.embedded.protocol import Limits, RequestParser
from slime.engine.embedded.refusal import Refused
from slime.engine.embedded.request import Request
from slime.engine.embedded.weight_routes import WeightRoutes

OPEN_PATHS = ("/health", "/metrics")
"""Paths that need no API key."""


class Server:
    """An engine, the application in front of it, and uvicorn."""

    def __init__(self, args: ServerArgs) -> None:
        self.has_crashed = False
        self._args = args
        tokenizer = _load_tokenizer(args)
        self._engine = Engine(args, report=self._report, crashed=self._crashed)
        runner = self._engine.runner
        eos = eos_token_ids(runner.model, tokenizer)
        limits = Limits(
            runner.context_length, runner.cache.num_tokens, runner.vocab_size, eos, runner.routed is not None
        )
        seed = args.random_seed if args.random_seed is not None else random.SystemRandom().getrandbits(63)
        self._generator = Generator(self._engine, RequestParser(tokenizer, limits, random_seed=seed), tokenizer)
        self._loop: asyncio.AbstractEventLoop | None = None
        level = max(logging.WARNING, logging.getLevelNamesMapping()[args.log_level.upper()])
        config = uvicorn.Config(self._application(), log_level=level, access_log=False, timeout_graceful_shutdown=1)
        self._uvicorn = uvicorn.Server(config)

    def run(self, listener: socket.socket) -> None:
        """Serves on a bound socket until the process is told to end, or the engine's thread dies."""
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine.start()
        await self._uvicorn.serve(sockets=[listener])

    def _application(self) -> FastAPI | _WithApiKey:
        app = FastAPI(title="slime embedded engine", openapi_url=None)
        admin = Admin(self._engine, self._generator, self._args)
        openai = OpenAI(self._generator, model_name=self._args.served_model_name or self._args.model_path)
        weights = WeightRoutes(self._engine)
        posts = {"/generate": self._generator.handle} | openai.writes() | admin.writes() | weights.routes()
        for methods, handlers in ((["GET"], admin.reads() | openai.reads()), (["POST", "PUT"], posts)):
            for path, handler in handlers.items():
                app.router.add_route(path, handler, methods=methods)
        for kind in ERROR_STATUS:
            app.add_exception_handler(kind, _answer_error)
        return app if self._args.api_key is None else _WithApiKey(app, self._args.api_key)

    def _report(self, news: list[Request]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_deliver, news)

    def _crashed(self) -> None:
        self.has_crashed = True
        self._uvicorn.should_exit = True


class _WithApiKey:
    """Lets requests through that bear the key, and those that only ask whether the server lives."""

    def __init__(self, app: FastAPI, api_key: str) -> None:
        self._app, self._expected = app, f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in OPEN_PATHS
        given = next((value for name, value in scope.get("headers", ()) if name == b"authorization"), b"")
        if is_open or hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
        else:
            await json_response(error_body("the API key is missing or wrong."), 401)(scope, receive, send)


def _deliver(news: list[Request]) -> None:
    for request in news:
        request.listener(request)


async def _answer_error(_: HTTPRequest, error: Exception) -> Response:
    return json_response(error_body(str(error)), ERROR_STATUS[type(error)])


def _load_tokenizer(args: ServerArgs) -> Any:
    folder = args.tokenizer_path or args.model_path
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise Refused(f"the tokenizer in {folder} cannot be loaded: {reason}") from error
