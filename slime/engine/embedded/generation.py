"""From a parsed generation to its HTTP answer, in the server's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse

from slime.engine.embedded.engine import Engine, EngineUnavailable
from slime.engine.embedded.outputs import OutputBuilder
from slime.engine.embedded.protocol import BadRequest, Generation, RequestParser, parse_json
from slime.engine.embedded.request import Request
from slime.engine.embedded.text import StopChecker

Handler = Callable[[HTTPRequest], Awaitable[Response]]
"""Answers one endpoint."""


class GenerationFailed(Exception):
    """A request ended with an error of the engine's."""


class Progress:
    """What the event loop knows of a generation's requests: wakes whoever waits when there is news."""

    def __init__(self) -> None:
        self.num_finished = 0
        self.changed: list[Request] = []
        self._wake: asyncio.Future[None] | None = None

    def notice(self, request: Request) -> None:
        """Called in the event loop with a request that has news."""
        self.changed.append(request)
        self.num_finished += request.is_finished
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def wait(self) -> list[Request]:
        """The requests with news since the last call; waits for some."""
        if not self.changed:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        changed, self.changed = self.changed, []
        return changed


class Generator:
    """Runs generations on an engine."""

    def __init__(self, engine: Engine, parser: RequestParser, tokenizer: Any) -> None:
        self.engine, self.parser, self.tokenizer = engine, parser, tokenizer

    async def handle(self, http: HTTPRequest) -> Response:
        """Answers `/generate`."""
        progress = Progress()
        generation = self.parser.parse(parse_json(await http.body()), progress.notice)
        if generation.stream:
            self.submit(generation)
            return StreamingResponse(self._events(generation, progress), media_type="text/event-stream")
        answers = await self.run(generation, progress, http)
        return json_response(answers if generation.is_list else answers[0])

    def submit(self, generation: Generation) -> None:
        """Hands the requests to the engine."""
        for request in generation.requests:
            if request.params.stop:
                skip = request.params.skip_special_tokens
                request.stop_checker = StopChecker(self.tokenizer, request.params.stop, skip_special_tokens=skip)
        self.engine.submit(generation.requests)

    async def run(self, generation: Generation, progress: Progress, http: HTTPRequest) -> list[dict[str, Any]]:
        """The answers of all requests, once they are finished; a client that goes away aborts them."""
        self.submit(generation)
        gone = asyncio.ensure_future(_wait_for_disconnect(http, self, generation))
        try:
            while progress.num_finished < len(generation.requests):
                await progress.wait()
        finally:
            gone.cancel()
        raise_error(generation)
        return [self.builder(request, generation).build(self.weight_version) for request in generation.requests]

    def builder(self, request: Request, generation: Generation) -> OutputBuilder:
        """The maker of one request's answers."""
        return OutputBuilder(request, self.tokenizer, text_in_logprobs=generation.text_in_logprobs)

    @property
    def weight_version(self) -> str:
        """The engine's version now."""
        return self.engine.scheduler.weight_version

    def abort(self, generation: Generation) -> None:
        """Ends what is not finished of a generation that nobody waits for."""
        unfinished = [request for request in generation.requests if not request.is_finished]
        if unfinished:
            self.engine.call(lambda: self.engine.scheduler.abort(unfinished, "The client went away."))

    async def stream(self, generation: Generation, progress: Progress) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Answers so far, cumulative, each with the place of its request; the last of each request is the whole one."""
        builders = [self.builder(request, generation) for request in generation.requests]
        places = {id(request): place for place, request in enumerate(generation.requests)}
        try:
            num_done = 0
            while num_done < len(generation.requests):
                changed = {id(request): request for request in await progress.wait()}
                num_done = progress.num_finished
                for request in changed.values():
                    if request.error is not None:
                        raise GenerationFailed(request.error)
                    place = places[id(request)]
                    yield place, builders[place].build(self.weight_version)
        finally:
            self.abort(generation)

    async def _events(self, generation: Generation, progress: Progress) -> AsyncIterator[bytes]:
        try:
            async for place, answer in self.stream(generation, progress):
                yield event({**answer, "index": place} if generation.is_list else answer)
        except GenerationFailed as error:
            yield event(error_body(str(error)))
        yield b"data: [DONE]\n\n"


async def _wait_for_disconnect(http: HTTPRequest, generator: Generator, generation: Generation) -> None:
    """Ends once the client is gone, after aborting what it asked for."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    generator.abort(generation)


def raise_error(generation: Generation) -> None:
    """Raises GenerationFailed if a request ended with an error."""
    for request in generation.requests:
        if request.error is not None:
            raise GenerationFailed(request.error)


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def error_body(message: str) -> dict[str, Any]:
    """The body of an error answer, as SGLang's."""
    return {"error": {"message": message}}


def json_response(body: Any, status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(orjson.dumps(body), status_code=status, media_type="application/json")


ERROR_STATUS: dict[type[Exception], int] = {BadRequest: 400, EngineUnavailable: 503, GenerationFailed: 500}
"""The HTTP status that each expected error is answered with."""
