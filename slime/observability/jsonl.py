"""Append-only files of one JSON object a line, which survive a crash in the middle of a line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 16


class JsonlWriter:
    """Appends objects to a file, each in one unbuffered write, so that several processes may share it.

    A last line that an earlier process left unfinished is cut off when the file is opened; a lock tells it from one
    that another process is writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        with self._locked(fcntl.LOCK_EX):
            size = self._file.seek(0, 2)
            complete = self._complete_bytes(size)
            if complete < size:
                self._file.truncate(complete)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. Raises OSError, naming the file, where it could not be written whole."""
        line = (json.dumps(_finite(record), allow_nan=False, ensure_ascii=False) + "\n").encode()
        try:
            with self._locked(fcntl.LOCK_SH):
                written = self._file.write(line)
        except OSError as error:
            raise OSError(error.errno, f"cannot write a line ({error.strerror})", str(self.path)) from error
        if written != len(line):
            raise OSError(f"cannot write a line to {self.path}: {written} of {len(line)} bytes fitted (disk full?)")

    def close(self) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Hold the file's lock, shared while a line is written; where a file system has none, go without."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._file, kind)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _complete_bytes(self, size: int) -> int:
        """The file's length up to and with its last newline."""
        end = size
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            self._file.seek(start)
            newline = (self._file.read(end - start) or b"").rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The file's objects; an unfinished last line is left out, any other bad line is a ValueError with its number."""
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or unfinished
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
        records.append(record)
    return records


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as the strings "nan", "inf", "-inf", which `float()` reads back."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value
