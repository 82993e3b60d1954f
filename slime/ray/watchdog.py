"""Waiting on other processes, never for ever: every wait has a deadline that names what it waited for."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

STACKS_DEADLINE_S = 5.0
_SLICE_S = 1.0  # how long one look takes, so that signals are seen in between


class DeadlineExpired(TimeoutError):
    """A wait took longer than allowed; the message says on what, and where every actor stands."""


def thread_stacks() -> str:
    """What every thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    parts = [f"[{names.get(ident)}]\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames.items()]
    return "\n".join(parts)


@dataclass
class Watchdog:
    """Waits for remote calls on behalf of the driver. `actors` are asked for their stacks when a deadline expires;
    `monitors` are calls that only ever return by raising, such as the fleet's watch."""

    actors: dict[str, ActorHandle] = field(default_factory=dict)
    monitors: list[ObjectRef] = field(default_factory=list)

    def get(self, refs: Sequence[ObjectRef], *, timeout_s: float, what: str) -> list[Any]:
        """The results of all `refs`; the first failure among them, or of a monitor, is raised at once.

        what: completes "waiting for ...". Raises DeadlineExpired after `timeout_s`.
        """
        results: dict[ObjectRef, Any] = {}
        deadline = time.monotonic() + timeout_s
        while pending := [ref for ref in refs if ref not in results]:
            done, _ = ray.wait(pending + self.monitors, num_returns=1, timeout=_SLICE_S)
            for ref in done:
                value = ray.get(ref)
                if ref in pending:
                    results[ref] = value
                else:
                    self.monitors.remove(ref)
            if not done and time.monotonic() > deadline:
                raise DeadlineExpired(self._report(what, timeout_s, len(pending), len(refs)))
        return [results[ref] for ref in refs]

    def _report(self, what: str, timeout_s: float, num_pending: int, num_all: int) -> str:
        stacks = self._stacks()
        text = "\n".join(f"--- {name}\n{stack}" for name, stack in stacks.items())
        return (
            f"waited {timeout_s:g} s for {what} ({num_pending} of {num_all} calls unanswered). "
            f"Where every actor stands:\n{text}"
        )

    def _stacks(self) -> Mapping[str, str]:
        refs: dict[str, ObjectRef] = {name: actor.stacks.remote() for name, actor in self.actors.items()}
        ready: list[ObjectRef] = []
        if refs:
            ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=STACKS_DEADLINE_S)
        return {name: _answer(ref) if ref in ready else "no answer" for name, ref in refs.items()}


def _answer(ref: ObjectRef) -> str:
    try:
        return str(ray.get(ref))
    except ray.exceptions.RayError as error:
        return f"gone: {str(error).splitlines()[0]}"
