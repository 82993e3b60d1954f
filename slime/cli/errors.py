"""From an exception to what the user reads: one sentence for what they can mend, a traceback for what we must."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


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
    except Exception as error:  # the one place where every failure of a run ends
        outcome.code = _report(error, outcome.log_dir)


def _report(error: Exception, log_dir: Path | None) -> int:
    from slime.config import ConfigError

    cause = _root_cause(error)
    if isinstance(cause, ConfigError):
        print(f"error: {cause}", file=sys.stderr)
        return 2
    text = "".join(traceback.format_exception(error))
    is_expected = isinstance(cause, (ValueError, OSError, RuntimeError)) and type(cause).__module__ != "builtins"
    is_expected = is_expected or type(cause) in (ValueError, OSError, FileNotFoundError, PermissionError)
    if not is_expected:
        print(text, file=sys.stderr)
    where = ""
    if log_dir is not None and log_dir.is_dir():
        path = log_dir / "error.log"
        path.write_text(text)
        where = f"\n(full traceback: {path})" if is_expected else ""
    print(f"error: {type(cause).__name__}: {cause}{where}", file=sys.stderr)
    return 1


def _root_cause(error: BaseException) -> BaseException:
    """What an actor raised, without what Ray wraps around it."""
    import ray

    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error
