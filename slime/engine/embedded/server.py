"""The HTTP server of one embedded engine: `python -m slime.engine.embedded.server --model-path DIR --port P`."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from transformers import AutoTokenizer

from slime.engine.embedded.admin import Admin
from slime.engine.embedded.args import ServerArgs, parse_server_args
from slime.engine.embedded.engine import Engine
from slime.engine.embedded.generation import ERROR_STATUS, Generator, error_body, json_response
from slime.engine.embedded.model_runner import ModelRefused, eos_token_ids
from slime.engine.embedded.protocol import Limits, RequestParser
from slime.engine.embedded.request import Request

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""How long the event loop may keep the interpreter while the model's thread wants it; Python's default is ten times as long."""


class Server:
    """An engine, the application in front of it, and the socket it listens on."""

    def __init__(self, args: ServerArgs) -> None:
        self.args = args
        self.socket = _listen(args.host, args.port)
        tokenizer = _load_tokenizer(args)
        self.engine = Engine(args, report=self._report, crashed=self._crashed)
        runner = self.engine.runner
        limits = Limits(
            runner.context_length, runner.cache.num_tokens, runner.vocab_size, eos_token_ids(runner.model, tokenizer)
        )
        seed = args.random_seed if args.random_seed is not None else random.SystemRandom().getrandbits(63)
        parser = RequestParser(tokenizer, limits, random_seed=seed)
        self.generator = Generator(self.engine, parser, tokenizer)
        self.has_crashed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        config = uvicorn.Config(
            self.make_app(), log_level=max(args.log_level, "warning", key=_level), access_log=False, timeout_graceful_shutdown=1
        )
        self.uvicorn = uvicorn.Server(config)

    def make_app(self) -> FastAPI:
        """The application with all its routes."""
        app = FastAPI(title="slime embedded engine", openapi_url=None)
        app.router.add_route("/generate", self.generator.handle, methods=["POST", "PUT"])
        Admin(self.engine, self.generator, self.args).add_routes(app)
        for kind in ERROR_STATUS:
            app.add_exception_handler(kind, _answer_error)
        return app

    async def run(self) -> None:
        """Serves until the process is told to end."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        await self.uvicorn.serve(sockets=[self.socket])

    def _report(self, news: list[Request]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_deliver, news)

    def _crashed(self) -> None:
        self.has_crashed = True
        self.uvicorn.should_exit = True


def _deliver(news: list[Request]) -> None:
    for request in news:
        request.listener(request)


async def _answer_error(_: HTTPRequest, error: Exception) -> Response:
    return json_response(error_body(str(error)), ERROR_STATUS[type(error)])


def _level(name: str) -> int:
    return logging.getLevelNamesMapping()[name.upper()]


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is known before the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ModelRefused(f"cannot listen on {host}:{port}: {error.strerror}.") from error
    return listener


def _load_tokenizer(args: ServerArgs) -> Any:
    folder = args.tokenizer_path or args.model_path
    if not os.path.isdir(folder):
        raise ModelRefused(f"{folder} is not a folder.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelRefused(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


def main() -> None:
    """Starts the server that the command line describes; a refusal is one sentence on stderr and exit code 1."""
    args = parse_server_args()
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        server = Server(args)
    except ModelRefused as refusal:
        sys.exit(f"error: {refusal}")
    logger.info("serving %s on http://%s:%d", args.model_path, args.host, args.port)
    with asyncio.Runner(loop_factory=server.uvicorn.config.get_loop_factory()) as runner:
        runner.run(server.run())
    os._exit(1 if server.has_crashed else 0)


if __name__ == "__main__":
    main()
