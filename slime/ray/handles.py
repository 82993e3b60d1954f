"""The driver's handles: the actors behind them, deadlines, and what is recorded of each call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle

from slime.arguments import Args
from slime.ray.actors import create_actor
from slime.ray.journal import Journal
from slime.ray.placement import Slots
from slime.ray.rollout_manager import RolloutResult
from slime.ray.train_actor import SendReport, TrainActor
from slime.ray.watchdog import Watchdog


@dataclass
class RolloutHandle:
    """The rollout manager, as the loop sees it."""

    args: Args
    manager: ActorHandle
    watchdog: Watchdog
    journal: Journal
    weight_version: int = 0

    def generate(self, rollout_id: int) -> ObjectRef:
        """A TrainBatch in the object store: tensors never pass through the driver."""
        with self.journal.phase("rollout", "the engines to sample and the rewards"):
            result: RolloutResult = self._get(
                self.manager.generate.remote(rollout_id, self.weight_version), "a rollout"
            )
        self.journal.rollout_metrics |= result.metrics
        return result.batch

    def eval(self, num_trained: int) -> None:
        """Evaluate the policy after `num_trained` rollouts."""
        with self.journal.phase("eval", "the evaluation"):
            metrics: dict[str, float] = self._get(self.manager.eval.remote(num_trained), "an evaluation")
        self.journal.evaluated(num_trained, metrics)

    def _get(self, ref: ObjectRef, what: str) -> Any:
        return self.watchdog.get([ref], timeout_s=self.args.rollout_timeout_s, what=what)[0]


class ActorGroup:
    """All trainer ranks. Each call goes to every rank and ends with the last, or with the first failure."""

    def __init__(self, args: Args, slots: Slots, run_dir: str, watchdog: Watchdog) -> None:
        self.args = args
        self.watchdog = watchdog
        self.shares_node = slots.trainers_share_node
        self.ranks: list[ActorHandle] = [
            create_actor(TrainActor, args, rank, run_dir, options=slots.options(bundle, "trainer"))
            for rank, bundle in enumerate(slots.trainer_bundles)
        ]
        for rank, actor in enumerate(self.ranks):
            watchdog.add(f"trainer {rank}", actor)

    def start(self, weights_dir: str) -> list[ObjectRef]:
        """Load the model on every rank. Returns calls that give the first rollout id."""
        call: ObjectRef = self.ranks[0].address.remote(loopback=self.shares_node)
        (address,) = self.watchdog.get([call], timeout_s=self.args.cluster_timeout_s, what="trainer 0 to start")
        ranks_per_node = min(len(self.ranks), self.args.actor_num_gpus_per_node)
        num_threads = self.args.num_threads or max(1, (os.cpu_count() or 1) // ranks_per_node)
        return [rank.start.remote(address, num_threads, weights_dir) for rank in self.ranks]

    def train(self, rollout_id: int, batch: ObjectRef) -> dict[str, float]:
        """One policy update. Returns the metrics of rank 0."""
        calls = [rank.train.remote(rollout_id, batch) for rank in self.ranks]
        return self._all(calls, self.args.train_timeout_s, f"training on rollout {rollout_id}")[0]

    def update_weights(self, engine_urls: list[str], version: int) -> SendReport:
        """Send the weights to the engines."""
        calls = [rank.update_weights.remote(engine_urls, version) for rank in self.ranks]
        return self._all(calls, self.args.weight_sync_timeout_s, f"weights v{version} to reach the engines")[0]

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint."""
        calls = [rank.save.remote(rollout_id) for rank in self.ranks]
        self._all(calls, self.args.train_timeout_s, f"the checkpoint of rollout {rollout_id}")

    def sleep(self) -> None:
        """Give device memory to the engines."""
        self._all([rank.sleep.remote() for rank in self.ranks], self.args.train_timeout_s, "trainers to sleep")

    def wake_up(self) -> None:
        """Take device memory back."""
        self._all([rank.wake_up.remote() for rank in self.ranks], self.args.train_timeout_s, "trainers to wake up")

    def _all(self, calls: Sequence[ObjectRef], timeout_s: float, what: str) -> list[Any]:
        return self.watchdog.get(calls, timeout_s=timeout_s, what=what)


@dataclass
class PolicyHandle:
    """The trainers, as the loop sees them."""

    group: ActorGroup
    journal: Journal

    def train(self, rollout_id: int, batch: ObjectRef) -> None:
        """One policy update on a rollout."""
        with self.journal.phase("train", "the trainers"):
            metrics = self.group.train(rollout_id, batch)
        for key, value in metrics.items():
            target = self.journal.train_metrics if key.startswith("train/") else self.journal.rollout_metrics
            target[key] = value
