"""HTTP with deadlines and bounded retries: the one place that owns a client."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import ipaddress
import logging
import random
import resource
import socket
import time
import weakref
from typing import Any

import aiohttp
import orjson
from aiohttp.client_proto import ResponseHandler

logger = logging.getLogger(__name__)

# A worker died or the router has none at the moment: another attempt may reach a restarted one.
RETRIED_STATUS = frozenset({502, 503, 504})
RETRIED_ERRORS = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError)
FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 2.0
LEAST_CONNECTIONS = 64
MOST_CONNECTIONS = 60_000  # ports of one address run out there

_sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession] = weakref.WeakKeyDictionary()


class HTTPError(RuntimeError):
    """An answer that is not 2xx, or none within the deadline. status: None where there was no answer."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def is_lost(self) -> bool:
        """Whether the server did not answer, as opposed to answering that it failed."""
        return self.status is None or self.status == 408


async def post(
    url: str,
    payload: Any,
    *,
    timeout_s: float = 14400.0,
    retry_for_s: float = 300.0,
    headers: dict[str, str] | None = None,
) -> Any:
    """POST `payload` as JSON; the answer's JSON.

    timeout_s: deadline of one attempt. retry_for_s: how long lost connections and answers 502, 503, 504 are tried
    again; other answers fail at once, with the server's words. Raises HTTPError.
    """
    return await _request("POST", url, orjson.dumps(payload), timeout_s, retry_for_s, headers)


async def get(
    url: str, *, timeout_s: float = 60.0, retry_for_s: float = 0.0, headers: dict[str, str] | None = None
) -> Any:
    """GET; the answer's JSON, or its text where it is none. Deadlines and errors as `post`."""
    return await _request("GET", url, None, timeout_s, retry_for_s, headers)


async def delete(url: str, *, timeout_s: float = 60.0, headers: dict[str, str] | None = None) -> Any:
    """DELETE; the answer's JSON. Raises HTTPError."""
    return await _request("DELETE", url, None, timeout_s, 0.0, headers)


async def _request(
    method: str, url: str, body: bytes | None, timeout_s: float, retry_for_s: float, headers: dict[str, str] | None
) -> Any:
    give_up_at = time.monotonic() + retry_for_s
    backoff_s = FIRST_BACKOFF_S
    while True:
        try:
            return await _attempt(method, url, body, timeout_s, headers)
        except HTTPError as error:
            if error.status is not None and error.status not in RETRIED_STATUS:
                raise
            if time.monotonic() + backoff_s > give_up_at:
                raise
            logger.debug("%s %s: %s; trying again in %.2f s", method, url, error, backoff_s)
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)


async def _attempt(method: str, url: str, body: bytes | None, timeout_s: float, headers: dict[str, str] | None) -> Any:
    all_headers = {"Content-Type": "application/json"} if body is not None else {}
    try:
        async with _session().request(
            method,
            url,
            data=body,
            headers=all_headers | (headers or {}),
            timeout=_timeout(timeout_s),
        ) as response:
            content = await response.read()
            status = response.status
    except RETRIED_ERRORS as error:
        raise HTTPError(f"{method} {url}: {type(error).__name__}: {error}", None) from error
    except TimeoutError as error:
        raise HTTPError(f"{method} {url}: no answer within {timeout_s:g} s", 408) from error
    if status >= 300:
        raise HTTPError(f"{method} {url} answered {status}: {content[:2000].decode(errors='replace')}", status)
    try:
        return orjson.loads(content) if content else None
    except orjson.JSONDecodeError:
        return content.decode(errors="replace")


@functools.lru_cache(maxsize=64)
def _timeout(total_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total_s)


def _session() -> aiohttp.ClientSession:
    """The client of the running event loop: connections are kept between calls, `max_connections` of them at most."""
    loop = asyncio.get_running_loop()
    session = _sessions.get(loop)
    if session is None or session.closed:
        connector = _Connections(limit=max_connections(), ttl_dns_cache=300)
        session = aiohttp.ClientSession(connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar())
        _sessions[loop] = session
        atexit.register(_close_at_exit, loop)
    return session


def max_connections() -> int:
    """Connections that a client may hold: nine tenths of the files this process may open (`ulimit -n`).

    The rest, 256 at least, is for logs, data, pipes and workers. Requests beyond wait for a connection.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return min(MOST_CONNECTIONS, max(LEAST_CONNECTIONS, soft - max(256, soft // 10)))


class _Connections(aiohttp.TCPConnector):
    """A pool whose limit counts idle connections too: aiohttp's own counts those in use.

    Without this, idle connections to one host and new ones to another add up to more files than may be open. aiohttp
    has no public way to it (seen in 3.14): where a later version keeps them elsewhere, its own rule holds.
    """

    async def _create_connection(self, req: aiohttp.ClientRequest, *others: Any, **named: Any) -> ResponseHandler:
        while self._num_held() > self.limit and self._drop_idle():
            await asyncio.sleep(0)  # its socket closes in the loop's next turn
        return await super()._create_connection(req, *others, **named)

    def _num_held(self) -> int:
        return len(getattr(self, "_acquired", ())) + sum(map(len, getattr(self, "_conns", {}).values()))

    def _drop_idle(self) -> bool:
        """Close the connection that has been idle longest, of the first host that has one."""
        for connections in getattr(self, "_conns", {}).values():
            if connections:
                connections.popleft()[0].close()
                return True
        return False


def _close_at_exit(loop: asyncio.AbstractEventLoop) -> None:
    """Close the client of a loop that still runs, in its own thread, when the process ends."""
    if loop.is_running():
        asyncio.run_coroutine_threadsafe(close(), loop).result(timeout=2.0)


async def close() -> None:
    """Close the client of the running event loop."""
    session = _sessions.pop(asyncio.get_running_loop(), None)
    if session is not None:
        await session.close()


def is_loopback(host: str) -> bool:
    """Whether a host name or address is that of this machine to itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_free_port(host: str = "127.0.0.1", *, highest: int = 65535) -> int:
    """A port up to `highest` that nobody listens on at the moment."""
    candidates = [0] if highest == 65535 else [random.randrange(20_000, highest + 1) for _ in range(1000)]
    for candidate in candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, candidate))
            return int(probe.getsockname()[1])
    raise OSError(f"no free port was found on {host}")
