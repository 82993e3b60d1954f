"""The same call to several engines, some of which may be lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future

from slime.engine.client import EngineClient
from slime.utils.async_utils import submit
from slime.utils.http_utils import HTTPError

Call = Callable[[EngineClient], Awaitable[None]]


class EngineCalls:
    """One call at a time, to all engines at once. A failure is kept for `result`: callers are in a collective.

    timeout_s: for each call of each engine.
    """

    def __init__(self, engines: Sequence[EngineClient], timeout_s: float) -> None:
        self._engines = list(engines)
        self._timeout_s = timeout_s
        self._lost: list[EngineClient] = []
        self._error: BaseException | None = None
        self._pending: Future[list[BaseException | None]] | None = None

    def make(self, call: Call) -> None:
        """Call every engine that is left, and wait for all."""
        self.begin(call)
        self.finish()

    def begin(self, call: Call) -> None:
        """Call every engine that is left; nothing after an error."""
        assert self._pending is None
        if self._engines and self._error is None:
            self._pending = submit(self._all(call))

    def finish(self) -> None:
        """Wait for what `begin` began, if anything."""
        if self._pending is None:
            return
        results, self._pending = self._pending.result(), None
        for engine, error in zip(list(self._engines), results, strict=True):
            if error is None:
                continue
            if not is_loss(error):
                self._error = self._error or error
                continue
            self._engines.remove(engine)
            self._lost.append(engine)

    def result(self) -> list[EngineClient]:
        """The engines that were lost. Raises the first error of another kind."""
        if self._error is not None:
            raise self._error
        return self._lost

    async def _all(self, call: Call) -> list[BaseException | None]:
        async def one(engine: EngineClient) -> None:
            async with asyncio.timeout(self._timeout_s):
                await call(engine)

        return await asyncio.gather(*(one(engine) for engine in self._engines), return_exceptions=True)


def is_loss(error: BaseException) -> bool:
    """Whether an engine cannot be reached or hangs, rather than refuse."""
    return isinstance(error, TimeoutError) or (isinstance(error, HTTPError) and error.is_lost)
