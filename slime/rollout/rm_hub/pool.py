"""Processes for synchronous reward functions: one that blocks, hangs or loops in C holds up nobody but itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from slime.rollout.rm_hub.errors import RewardError
from slime.rollout.rm_hub.worker_process import HEADER, REPLY_HEADER, samples_of

GRACE_S = 5.0  # for a function whose reward nobody waits for any more
START_S = 120.0  # deadline for the start of a process; the imports of a function count towards its first call
_CHUNK_BYTES = 1 << 16


def default_num_workers() -> int:
    """One for each CPU that this process may use, within 4 and 64."""
    return min(64, max(4, len(os.sched_getaffinity(0))))


async def call_in_worker(
    path: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    sample_index: int | None,
    timeout_s: float,
    num_workers: int,
) -> Any:
    """What the function at `path` returns for (*args, **kwargs) in a process of its own.

    At most `num_workers` run at a time, the others wait, their deadline not yet running. Metadata that the function
    writes into samples is copied back. Raises RewardError if it raises, takes longer than `timeout_s` seconds (its
    process is then killed) or ends its process. Where this call is cancelled the function has GRACE_S to end.
    """
    settings = args[:1] if args and _is_frozen(args[0]) else ()
    try:
        pickled_settings = _pickled(*settings) if settings else b""
        request = pickle.dumps((path, bool(settings), args[len(settings) :], kwargs))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        reason = f"its arguments cannot be sent to a process ({error}): make it async, or set --rm-num-workers 0"
        raise RewardError(path, sample_index, reason) from error
    async with _slots(asyncio.get_running_loop(), num_workers):
        reply = await _exchange(path, (pickled_settings, request), sample_index, timeout_s)
    if reply[0] == "raised":
        failure = RewardError(path, sample_index, f"raised {reply[1]}")
        failure.add_note(reply[2])
        raise failure
    for sample, written in zip(samples_of(args), reply[2], strict=True):
        vars(sample).update(written)
    return reply[1]


def _is_frozen(value: Any) -> bool:
    """Whether `value` is a frozen dataclass, such as the settings: pickled once, and sent to a worker once."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


_recent_settings: deque[tuple[Any, bytes]] = deque(maxlen=8)  # those of each evaluation set are others


def _pickled(settings: Any) -> bytes:
    """The settings as bytes, the same object as long as they are the same."""
    for known, pickled in _recent_settings:
        if known is settings:
            return pickled
    pickled = pickle.dumps(settings)
    _recent_settings.append((settings, pickled))
    return pickled


async def _exchange(path: str, request: tuple[bytes, bytes], sample_index: int | None, timeout_s: float) -> Any:
    worker = await _take()
    exchange = asyncio.create_task(worker.exchange(*request))
    _running.add(exchange)
    exchange.add_done_callback(partial(_settle, worker))
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(exchange)
    except TimeoutError as error:
        worker.kill()
        raise RewardError(path, sample_index, f"no reward within {timeout_s:g} s (--rm-timeout-s)") from error
    except ConnectionError as error:
        raise RewardError(path, sample_index, "its process ended while it ran") from error
    except asyncio.CancelledError:  # most functions end soon, and their processes are worth keeping
        timer = asyncio.get_running_loop().call_later(GRACE_S, worker.kill)
        exchange.add_done_callback(lambda _: timer.cancel())
        raise


def _settle(worker: Worker, exchange: asyncio.Task[Any]) -> None:
    """A worker that answered waits for the next request, any other is ended."""
    _running.discard(exchange)
    if exchange.cancelled() or exchange.exception() is not None:
        worker.kill()
        worker.close()
    else:
        _idle.append(worker)


_running: set[asyncio.Task[Any]] = set()
_idle: list[Worker] = []  # of this operating-system process, whatever event loop uses them


async def _take() -> Worker:
    """A worker that waits for a request and imports from where this process does; a new one where there is none."""
    while _idle:
        worker = _idle.pop()
        if worker.is_alive() and worker.import_path == sys.path:
            return worker
        worker.kill()
        worker.close()
    worker = Worker()
    try:
        async with asyncio.timeout(START_S):
            await worker.receive()
    except (TimeoutError, ConnectionError) as error:
        worker.kill()
        worker.close()
        raise RuntimeError(f"a process for rewards ended at its start, or took over {START_S:.0f} s") from error
    except BaseException:
        worker.kill()
        worker.close()
        raise
    return worker


@lru_cache(maxsize=8)
def _slots(loop: asyncio.AbstractEventLoop, num_workers: int) -> asyncio.Semaphore:
    """One limit for each event loop: a semaphore cannot serve two."""
    return asyncio.Semaphore(num_workers)


class Worker:
    """A `worker_process`. It ends with the process that started it."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("worker_process.py")
        self._is_killed = False
        self._settings: bytes | None = None  # what it holds
        self.import_path = list(sys.path)
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            command = [sys.executable, "-P", str(program), str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, self.import_path))},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return not self._is_killed and self._process.poll() is None

    async def exchange(self, settings: bytes, request: bytes) -> Any:
        """The answer to one pickled request. Raises ConnectionError if the process ends instead.

        settings: pickled, b"" for none; sent where the process holds others.
        """
        news = b"" if settings is self._settings else settings
        self._settings = settings or self._settings
        head = HEADER.pack(len(news), len(request))
        await asyncio.get_running_loop().sock_sendall(self._socket, b"".join((head, news, request)))
        return await self.receive()

    async def receive(self) -> Any:
        """The next message of the process. Raises ConnectionError if it ends instead."""
        loop = asyncio.get_running_loop()
        received, num_bytes = bytearray(), REPLY_HEADER.size
        while len(received) < num_bytes:
            chunk = await loop.sock_recv(self._socket, _CHUNK_BYTES)  # most messages come whole
            if not chunk:
                raise ConnectionError("the socket closed")
            received += chunk
            if len(received) >= REPLY_HEADER.size:
                num_bytes = REPLY_HEADER.size + REPLY_HEADER.unpack_from(received)[0]
        return pickle.loads(memoryview(received)[REPLY_HEADER.size :])

    def kill(self) -> None:
        """End it and what it started, at once."""
        if self._is_killed:
            return
        self._is_killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        threading.Thread(target=self._process.wait, name="reward-reaper", daemon=True).start()

    def close(self) -> None:
        """Let go of its socket, once nothing reads from it."""
        self._socket.close()
