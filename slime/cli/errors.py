"""From an exception to what the user reads: one sentence for what they can mend, a traceback for what we must."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import slime
from slime.utils.processes import Terminated

# Builtin errors that are raised with a sentence for the user; of RuntimeError only slime's own subclasses are.
_EXPECTED = (ValueError, OSError)
_FRAME = re.compile(r'^ *File "(?P<file>[^"<]+)", line (?P<line>\d+), in (?P<function>.+)$', re.MULTILINE)
_PACKAGE = str(Path(slime.__file__).parent)
_LIBRARY = re.compile(r"/(lib/python3\.\d+|site-packages|dist-packages)/")


@dataclass
class Outcome:
    """code: the exit code. log_dir: where the full traceback goes."""

    code: int = 0
    log_dir: Path | None = None


@contextmanager
def reported_errors() -> Iterator[Outcome]:
    """Turn an exception into a message on standard error and an exit code."""
    outcome = Outcome()
    try:
        yield outcome
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        outcome.code = 130
    except Terminated as error:
        print(error, file=sys.stderr)
    except Exception as error:  # the one place where every failure of a run ends
        outcome.code = _report(error, outcome.log_dir)


def _report(error: Exception, log_dir: Path | None) -> int:
    from slime.config import ConfigError

    cause = _root_cause(error)
    if isinstance(cause, ConfigError):
        print(f"error: {' '.join(str(cause).split())}", file=sys.stderr)
        return 2
    text = "".join(traceback.format_exception(error))
    place = _place_of_user(text)
    where = f" ({type(cause).__name__}{place})" if place else ""
    if not _is_expected(cause):
        print(text, file=sys.stderr)
        where = f" ({type(cause).__name__}{place})"
    print(f"error: {cause}{where}{_kept(text, log_dir)}", file=sys.stderr)
    return 1


def _place_of_user(text: str) -> str:
    """` in FUNCTION, FILE:LINE` where a traceback ends in a file of the user's, such as a plug-in; else empty.

    What a library raised counts for its caller. It is the text that is read: of another process there is no other.
    """
    for frame in reversed(list(_FRAME.finditer(text))):
        if frame["file"].startswith(_PACKAGE):
            return ""
        if not _LIBRARY.search(frame["file"]):
            return f" in {frame['function']}, {frame['file']}:{frame['line']}"
    return ""


def _is_expected(cause: BaseException) -> bool:
    kind = type(cause)
    is_ours = kind.__module__.split(".")[0] == "slime" and isinstance(cause, (ValueError, OSError, RuntimeError))
    return is_ours or (kind.__module__ == "builtins" and issubclass(kind, _EXPECTED))


def _kept(text: str, log_dir: Path | None) -> str:
    """Write the traceback into the run directory, if there is one and it takes it; where it is, for the message."""
    if log_dir is None or not log_dir.is_dir():
        return ""
    path = log_dir / "error.log"
    try:
        path.write_text(text)
    except OSError as error:
        return f"\n(the traceback could not be written: {error})"
    return f"\n(traceback: {path})"


def _root_cause(error: BaseException) -> BaseException:
    """What an actor raised, without what Ray wraps around it."""
    if "ray" not in sys.modules:
        return error
    import ray

    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error
