"""Small helpers without a better home."""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Iterator
from typing import Any


def load_function(path: str) -> Any:
    """The attribute that a dotted path names, such as `package.module.function`.

    Raises ValueError, with the path and the reason, where it does not import or does not exist.
    """
    module_name, _, attribute = path.rpartition(".")
    if not module_name or not attribute:
        raise ValueError(f"plug-in path {path!r} must be dotted: package.module.function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"plug-in {path!r}: cannot import {module_name!r} ({error}). Is its folder on PYTHONPATH?"
        ) from error
    except Exception as error:  # the module is the user's and may raise anything
        raise ValueError(
            f"plug-in {path!r}: importing {module_name!r} raised {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"plug-in {path!r}: module {module_name!r} has no attribute {attribute!r}")
    return getattr(module, attribute)


@contextlib.contextmanager
def rare_garbage_collection(threshold: int = 200_000) -> Iterator[None]:
    """Look for cycles once in `threshold` new objects while the block runs, and among what was there before not at all.

    Thousands of samples in flight are live objects that hold none; the usual threshold of 700 has the collector walk
    them over and over, and with them, now and then, a million objects of imported modules.
    """
    previous = gc.get_threshold()
    gc.set_threshold(threshold, *previous[1:])
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*previous)


def is_due(rollout_id: int, interval: int | None, num_rollout: int | None = None) -> bool:
    """Whether something done every `interval` rollouts is due after `rollout_id`; the last rollout always is.

    num_rollout: where given, the rollout `num_rollout - 1` is due whatever the interval, also where there is none.
    """
    is_last = num_rollout is not None and rollout_id == num_rollout - 1
    return is_last or (interval is not None and (rollout_id + 1) % interval == 0)
