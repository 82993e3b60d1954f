"""Waiting on other processes, never for ever: every wait has a deadline that names what it waited for."""

from __future__ import annotations

import logging
import re
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
_SETTLE_S = 3.0  # after a failure: for the death of another rank to be known, which may be its cause


class DeadlineExpired(TimeoutError):
    """A wait took longer than allowed; the message says on what, and where every actor stands."""


class ActorDied(RuntimeError):
    """The process of an actor ended in the middle of a call; the message names the actor."""


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

        what: completes "waiting for ...". Raises DeadlineExpired after `timeout_s`, ActorDied where a process ended.
        """
        results: dict[ObjectRef, Any] = {}
        deadline = time.monotonic() + timeout_s
        while pending := [ref for ref in refs if ref not in results]:
            done, _ = ray.wait(pending + self.monitors, num_returns=1, timeout=_SLICE_S)
            for ref in done:
                try:
                    results[ref] = ray.get(ref)
                except ray.exceptions.RayError as error:
                    death = self._death({ref: error}, pending, what)
                    if death is not None:
                        raise death from error
                    error.add_note(f"in {self._name_of(ref)}, while the driver waited for {what}")
                    raise
                if ref in self.monitors:
                    self.monitors.remove(ref)
            if not done and time.monotonic() > deadline:
                raise DeadlineExpired(self._report(what, timeout_s, [ref for ref in refs if ref not in results]))
        return [results[ref] for ref in refs]

    def _death(
        self, failures: dict[ObjectRef, ray.exceptions.RayError], pending: list[ObjectRef], what: str
    ) -> ActorDied | None:
        """The dead actor by name, if one died: that comes before the complaints of those that talked to it."""
        failures = failures | self._failures_soon([ref for ref in pending if ref not in failures])
        for ref, failure in failures.items():
            if isinstance(failure, ray.exceptions.RayActorError) and not failure.actor_init_failed:
                return ActorDied(
                    f"{self._name_of(ref)}{_pid_in(failure)} died while the driver waited for {what}: it was killed, "
                    "ran out of memory or crashed. With --save, --resume continues from the last checkpoint."
                )
        return None

    def _failures_soon(self, refs: list[ObjectRef]) -> dict[ObjectRef, ray.exceptions.RayError]:
        """Which of `refs` fail within a moment: when a rank dies, its peers' collectives fail as fast as it does."""
        if not refs:
            return {}
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=_SETTLE_S)
        failures = {}
        for ref in done:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                failures[ref] = error
        return failures

    def _name_of(self, ref: ObjectRef) -> str:
        actor_id = ref.task_id().actor_id()
        return next((name for name, actor in self.actors.items() if actor._actor_id == actor_id), "an actor")

    def _report(self, what: str, timeout_s: float, pending: list[ObjectRef]) -> str:
        text = "\n".join(f"--- {name}\n{stack}" for name, stack in self._stacks().items())
        silent = ", ".join(self._name_of(ref) for ref in pending)
        return f"waited {timeout_s:g} s for {what}; no answer from {silent}. Where every actor stands:\n{text}"

    def _stacks(self) -> Mapping[str, str]:
        refs: dict[str, ObjectRef] = {name: actor.stacks.remote() for name, actor in self.actors.items()}
        ready: list[ObjectRef] = []
        if refs:
            ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=STACKS_DEADLINE_S)
        return {name: _answer(ref) if ref in ready else "no answer" for name, ref in refs.items()}


def _pid_in(error: ray.exceptions.RayActorError) -> str:
    match = re.search(r"pid: (\d+)", str(error))
    return f" (pid {match[1]})" if match else ""


def _answer(ref: ObjectRef) -> str:
    try:
        return str(ray.get(ref))
    except ray.exceptions.RayError as error:
        return f"gone: {str(error).splitlines()[0]}"
