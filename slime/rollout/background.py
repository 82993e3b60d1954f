"""The first failure of what samples between the calls of a rollout function, for whoever watches over this process."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import NoReturn

_first: Future[NoReturn] = Future()


def report_failure(error: BaseException) -> None:
    """Have `raise_first_failure` raise `error`. From any thread; of several the first counts."""
    with suppress(InvalidStateError):
        _first.set_exception(error)


def raise_first_failure() -> NoReturn:
    """Blocks until something fails, and raises that."""
    _first.result()
    raise AssertionError("a failure was reported without its error")
