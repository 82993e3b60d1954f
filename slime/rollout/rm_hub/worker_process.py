"""The process that runs a user's synchronous reward function: `worker_process.py SOCKET_FD PARENT_PID`.

One request at a time, each a length and a pickle: (path, args, kwargs) in, one of these out:

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

HEADER = struct.Struct("!Q")
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
        while header := requests.read(HEADER.size):
            (length,) = HEADER.unpack(header)
            connection.sendall(_answer(requests.read(length), runner))


def _answer(request: bytes, runner: asyncio.Runner) -> bytes:
    try:
        path, args, kwargs = pickle.loads(request)
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
    return HEADER.pack(len(body)) + body


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
