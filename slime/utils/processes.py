"""Processes that slime starts and therefore owns: they end with their owner, also when it is killed."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slime.utils import process_guard


class Terminated(Exception):
    """SIGTERM came at a moment when there is nothing to save; not a failure."""


MOST_OPEN_FILES = 65_536


class OwnedProcess:
    """A command under `process_guard`, with standard output and error in a log file."""

    def __init__(self, command: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None) -> None:
        """env: the whole environment of the command; None inherits."""
        self.command = list(command)
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", process_guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Exit code (0 to 255), or None while it runs."""
        return self._guard.poll()

    def log_tail(self, num_lines: int = 30) -> str:
        """The last lines of its log."""
        with self.log_path.open(errors="replace") as log:
            return "".join(collections.deque(log, maxlen=num_lines)).rstrip()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End it: SIGTERM, SIGKILL after 3 s."""
        if self._guard.stdin is not None and not self._guard.stdin.closed:
            self._guard.stdin.close()
        try:
            self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._guard.kill()


@contextlib.contextmanager
def owned_directory(root: Path, *, prefix: str) -> Iterator[Path]:
    """A new folder `root/prefix...`, deleted at the end, also where that is a SIGKILL of this process.

    A shell waits for its standard input to close, as it does when this process dies. It deletes twice, since others may
    still be writing as they die.
    """
    root.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    script = 'read -r _; rm -rf -- "$0"; sleep 5; rm -rf -- "$0"'
    guard = subprocess.Popen(["/bin/sh", "-c", script, str(directory)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        guard.kill()
        guard.wait()
        assert guard.stdin is not None
        guard.stdin.close()


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Be the only one with `folder` in such a block, also where the other is another process.

    Raises BlockingIOError at once where somebody else is. The kernel ends it with this process, however that ends. A
    file system without locks lets everybody in.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def raise_open_file_limit() -> int:
    """Lift the soft limit on open files, as far as 65,536: each request in flight holds a socket. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)
