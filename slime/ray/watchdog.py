"""Waiting on other processes, never for ever: every wait has a deadline that names what it waited for."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

Service = Callable[[Any], ObjectRef]

STACKS_DEADLINE_S = 5.0
_SLICE_S = 1.0  # how long one look takes, so that signals are seen in between
_SETTLE_S = 3.0  # after a failure: for the death of another rank to be known, which may be its cause


class DeadlineExpired(TimeoutError):
    """A wait took longer than allowed; the message says on what, and where every actor stands."""


class ActorDied(RuntimeError):
    """The process of an actor ended in the middle of a call; the message names the actor."""


class _Death(NamedTuple):
    ref: ObjectRef
    error: ray.exceptions.RayError


def thread_stacks() -> str:
    """What every thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    parts = [f"[{names.get(ident)}]\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames.items()]
    return "\n".join(parts)


def wait_for_the_end() -> None:
    """Blocks until the process ends."""
    threading.Event().wait()


@dataclass
class Watchdog:
    """Waits for remote calls on behalf of the driver. `actors` are asked for their stacks when a deadline expires;
    `monitors` are calls that go on beside others, such as an actor's `live`: when one raises, any wait ends."""

    actors: dict[str, ActorHandle] = field(default_factory=dict)
    monitors: list[ObjectRef] = field(default_factory=list)
    services: dict[ObjectRef, Service] = field(default_factory=dict)
    _interruption: tuple[float, Exception] | None = None

    def interrupt(self, error: Exception, *, after_s: float = 0.0) -> None:
        """Have any wait raise `error` after `after_s` seconds. For signal handlers: Ray may swallow what they raise."""
        self._interruption = (time.monotonic() + after_s, error)

    def serve(self, request: ObjectRef, service: Service) -> None:
        """When `request` has a result, `service` gets it, in the middle of any wait, and returns the next request."""
        self.services[request] = service

    def add(self, name: str, actor: ActorHandle) -> None:
        """Take an actor that has `stacks` and `live` under watch."""
        self.actors[name] = actor
        self.monitors.append(actor.live.remote())

    def watched(self, ref: ObjectRef) -> ObjectRef:
        """`ref`, a call whose result is asked for later: until it returns, its failure ends any wait."""
        self.monitors.append(ref)
        return ref

    def get(self, refs: Sequence[ObjectRef], *, timeout_s: float, what: str) -> list[Any]:
        """The results of all `refs`; the first failure among them, or of a monitor, is raised at once.

        what: completes "waiting for ...". Raises DeadlineExpired after `timeout_s`, ActorDied where a process ended.
        """
        results: dict[ObjectRef, Any] = {}
        deadline = time.monotonic() + timeout_s
        while pending := [ref for ref in refs if ref not in results]:
            if self._interruption is not None and time.monotonic() >= self._interruption[0]:
                raise self._interruption[1]
            beside = [ref for ref in self.monitors if ref not in pending]
            done, _ = ray.wait(pending + beside + list(self.services), num_returns=1, timeout=_SLICE_S)
            for ref in done:
                try:
                    if ref in self.services:
                        self._serve(ref)
                        continue
                    results[ref] = ray.get(ref)
                    self.monitors = [monitor for monitor in self.monitors if monitor != ref]
                except ray.exceptions.RayError as error:
                    death = self._death(ref, error, pending)
                    if death is not None:
                        raise self._obituary(death, what) from death.error
                    error.add_note(f"in {self._name_of(ref)}, while the driver waited for {what}")
                    raise
            if not done and time.monotonic() > deadline:
                raise DeadlineExpired(self._report(what, timeout_s, [ref for ref in refs if ref not in results]))
        return [results[ref] for ref in refs]

    def _serve(self, request: ObjectRef) -> None:
        service = self.services.pop(request)  # not served anew by the waits of the service itself
        self.serve(service(ray.get(request)), service)

    def _death(self, first: ObjectRef, error: ray.exceptions.RayError, pending: list[ObjectRef]) -> _Death | None:
        """The actor whose process ended, if that is behind a failed call. When a rank dies, its peers' collectives may
        fail before the death is known: where others still work on the same, it is waited for."""
        if _is_death(error):
            return _Death(first, error)
        peers = [ref for ref in pending if ref != first] if first in pending else []
        deadline = time.monotonic() + _SETTLE_S
        while peers and (left_s := deadline - time.monotonic()) > 0:
            done, peers = ray.wait(peers, num_returns=1, timeout=left_s)
            for ref in done:
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as failure:
                    if _is_death(failure):
                        return _Death(ref, failure)
        return None

    def _name_of(self, ref: ObjectRef) -> str:
        actor_id = ref.task_id().actor_id()
        return next((name for name, actor in self.actors.items() if actor._actor_id == actor_id), "an actor")

    def _obituary(self, death: _Death, what: str) -> ActorDied:
        match = re.search(r"pid: (\d+)", str(death.error))
        name = self._name_of(death.ref) + (f" (pid {match[1]})" if match else "")
        return ActorDied(
            f"{name} died while the driver waited for {what}: it was killed, "
            "ran out of memory or crashed. With --save, --resume continues from the last checkpoint."
        )

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


def _is_death(error: ray.exceptions.RayError) -> bool:
    return isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed


def _answer(ref: ObjectRef) -> str:
    try:
        return str(ray.get(ref))
    except ray.exceptions.RayError as error:
        return f"gone: {str(error).splitlines()[0]}"
