"""Runs a command that ends with its owner: `python process_guard.py COMMAND ...`, its input held open by the owner.

When standard input closes, as it does when the owner dies of whatever cause, the command's process group is ended:
SIGTERM, then SIGKILL. Imports the standard library only, so that it starts in some 20 ms.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

GRACE_S = 3.0
PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """The command's exit code; 128 + N where signal N ended it, as shells have it."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with(os.getpid())
    )
    signal.signal(signal.SIGTERM, lambda *_: _end_group(child))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the owner's affair
    threading.Thread(target=_wait_for_owner, args=(child,), daemon=True).start()
    code = child.wait()
    _signal_group(child, signal.SIGKILL)  # what the command left behind
    return code if code >= 0 else 128 - code


def _die_with(guard: int) -> Callable[[], None]:
    """Linux: run in the command's process, it asks for SIGKILL when `guard` dies, should somebody kill it."""

    def ask() -> None:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # it died before we asked
            os._exit(1)

    return ask


def _wait_for_owner(child: "subprocess.Popen[bytes]") -> None:
    while sys.stdin.buffer.read(4096):
        pass
    _end_group(child)


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    _signal_group(child, signal.SIGTERM)
    timer = threading.Timer(GRACE_S, _signal_group, (child, signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _signal_group(child: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
