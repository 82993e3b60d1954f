"""Who holds device memory when, and how weights reach the engines: one object instead of a flag in the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ray.actor import ActorHandle

from slime.arguments import Args
from slime.ray.handles import ActorGroup, RolloutAhead, RolloutHandle
from slime.ray.journal import Journal
from slime.ray.watchdog import Watchdog


class Memory(Protocol):
    """The hand-over between sampling and training."""

    def to_training(self) -> None:
        """From here on the trainers have the device."""
        ...

    def sync_weights(self, version: int) -> None:
        """Engines hold the trainers' weights as `version`, and have the device, from here on."""
        ...


@dataclass
class Disaggregated:
    """Trainers and engines have devices of their own: nothing to hand over but the weights.

    sleepers: the trainers on the engines' slots, where they share them.
    """

    args: Args
    fleet: ActorHandle
    actor: ActorGroup
    sleepers: list[ActorGroup]
    rollout: RolloutHandle
    watchdog: Watchdog
    journal: Journal

    def to_training(self) -> None:
        """Nothing moves."""

    def sync_weights(self, version: int) -> None:
        """pause -> send -> continue, then restart what was lost on the way."""
        with self.journal.phase("update_weights", "the engines to take the weights"):
            self._send(version)

    def _send(self, version: int) -> None:
        urls: list[str | None] = self._fleet("begin_update")
        with self.journal.phase("send_weights", "the engines to take the weights"):
            report = self.actor.update_weights(urls, version)
        self._fleet("weights_sent", version, report.directory, report.failed)
        self.rollout.weight_version = version

    def _fleet(self, method: str, *args: Any) -> Any:
        call = getattr(self.fleet, method).remote(*args)
        timeout_s = self.args.weight_sync_timeout_s + self.args.engine_start_timeout_s  # some may be started anew
        return self.watchdog.get([call], timeout_s=timeout_s, what=f"the engines ({method})")[0]


@dataclass
class UpdatedBetweenRollouts(Disaggregated):
    """Engines sample one rollout ahead: each rollout is sampled by one version, and a version may be left out.

    is_due: whether a version is sent.
    """

    ahead: RolloutAhead
    is_due: Callable[[int], bool]

    def sync_weights(self, version: int) -> None:
        """Where it is due, once engines are done with what they have."""
        if self.is_due(version):
            self.ahead.finish()
            super().sync_weights(version)


@dataclass
class Colocated(Disaggregated):
    """Trainers and engines take turns on the same devices."""

    def to_training(self) -> None:
        """Engines give their memory up, trainers take theirs."""
        with self.journal.phase("to_training", "engines to sleep and trainers to wake up"):
            if self.args.offload_rollout:
                self._fleet("release_memory", ["kv_cache", "weights"])
            if self.args.offload_train:
                for trainers in self.sleepers:
                    trainers.wake_up()

    def sync_weights(self, version: int) -> None:
        """Weights first, then the trainers sleep, then the engines' cache fits."""
        with self.journal.phase("update_weights", "the engines to take the weights"):
            if self.args.offload_rollout:
                self._fleet("resume_memory", ["weights"])
            self._send(version)
            if self.args.offload_train:
                for trainers in self.sleepers:
                    trainers.sleep()
            if self.args.offload_rollout:
                self._fleet("resume_memory", ["kv_cache"])


class NoEngines:
    """--debug-train-only: nobody samples."""

    def to_training(self) -> None:
        """Trainers have the device all the time."""

    def sync_weights(self, version: int) -> None:
        """There is nobody to send to."""


@dataclass
class EnginesOnly:
    """--debug-rollout-only: engines serve the checkpoint that they started from."""

    args: Args
    fleet: ActorHandle
    watchdog: Watchdog
    is_open: bool = False

    def to_training(self) -> None:
        """Engines have the device all the time."""

    def sync_weights(self, version: int) -> None:
        """The first time engines are opened to requests; there are no other weights to send."""
        if self.is_open:
            return
        timeout_s = self.args.engine_start_timeout_s
        self.watchdog.get([self.fleet.begin_update.remote()], timeout_s=timeout_s, what="the engines to be up")
        opened = self.fleet.weights_sent.remote(version, self.args.hf_checkpoint, [])
        self.watchdog.get([opened], timeout_s=timeout_s, what="the engines to be registered")
        self.is_open = True
