"""The process that runs a user's synchronous reward function: `worker_process.py SOCKET_FD PARENT_PID`.

One request at a time: two lengths, pickled settings where they are not those of the last request, and the pickled
(path, whether the settings come before args, args, kwargs). Out goes a length and one of these, pickled:

    ("returned", value, [what the function changed of each sample])      ("raised", "KeyError: 'x'", traceback)

Functions run in its main thread, so that those that set signals work, with one event loop for all that return
awaitables. It may be killed at any moment: a function that loops in C answers to nothing else. Run as
a file; it ends with its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from typing import Any

from slime.utils.misc import load_function
from slime.utils.types import Sample

HEADER = struct.Struct("!QQ")
REPLY_HEADER = struct.Struct("!Q")
WRITABLE = ("metadata", "train_metadata", "remove_sample")  # what a reward function may change of a sample
_PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int) -> None:
    """Answer requests until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    with contextlib.suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        return
    connection = socket.socket(fileno=descriptor)
    connection.sendall(_frame("ready"))
    with connection.makefile("rb") as requests, asyncio.Runner() as runner:
        settings: list[Any] = []
        while header := requests.read(HEADER.size):
            lengths = HEADER.unpack(header)
            connection.sendall(_answer(requests.read(lengths[0]), requests.read(lengths[1]), settings, runner))


def _answer(news: bytes, request: bytes, settings: list[Any], runner: asyncio.Runner) -> bytes:
    """settings: one entry, of the last request that had some, as bytes until it is needed; `news` replaces it."""
    if news:
        settings[:] = [news]
    try:
        path, takes_settings, args, kwargs = pickle.loads(request)
        if takes_settings:
            if isinstance(settings[0], bytes):
                settings[0] = pickle.loads(settings[0])
            args = (settings[0], *args)
        value = load_function(path)(*args, **kwargs)
        if inspect.isawaitable(value):
            value = runner.run(_await(value))
        return _frame(("returned", value, [_written(sample) for sample in samples_of(args)]))
    except BaseException as error:  # a plug-in may raise anything, SystemExit too; the parent fails the sample, by name
        return _frame(("raised", f"{type(error).__name__}: {error}", traceback.format_exc()))


async def _await(value: Any) -> Any:
    return await value


def samples_of(args: tuple[Any, ...]) -> list[Sample]:
    """The samples among positional arguments, those of a list included."""
    found = []
    for value in args:
        members = value if isinstance(value, list) else [value]
        found += [member for member in members if isinstance(member, Sample)]
    return found


def _written(sample: Sample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in WRITABLE}


def _frame(message: Any) -> bytes:
    body = pickle.dumps(message)
    return REPLY_HEADER.pack(len(body)) + body


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
