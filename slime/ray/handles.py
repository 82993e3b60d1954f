"""The driver's handles: the actors behind them, deadlines, and what is recorded of each call."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray import ObjectRef
from ray.actor import ActorHandle

from slime.arguments import Args
from slime.ray.actors import create_actor
from slime.ray.current_weights import WeightFiles
from slime.ray.journal import Journal
from slime.ray.placement import Slots
from slime.ray.rollout_manager import RolloutResult
from slime.ray.train_actor import PROCESS_NAMES, CriticReport, Role, SendReport, TrainActor
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

    def save(self, rollout_id: int) -> None:
        """Write the state of the data source after `rollout_id`."""
        self._wait_for_save(self.manager.save.remote(rollout_id))

    def _wait_for_save(self, call: ObjectRef) -> None:
        self.watchdog.get([call], timeout_s=self.args.train_timeout_s, what="the data source to be saved")

    def _get(self, ref: ObjectRef, what: str) -> Any:
        return self.watchdog.get([ref], timeout_s=self.args.rollout_timeout_s, what=what)[0]


class _Ahead(NamedTuple):
    rollout_id: int
    call: ObjectRef


@dataclass
class RolloutAhead(RolloutHandle):
    """The rollout manager one rollout ahead: it samples rollout N + 1 while N is trained on, and evaluates beside that.

    The manager runs its calls in turn, so what is saved of the data source after N is from before N + 1. What fails
    among them ends whatever the driver waits for, at once.
    """

    num_rollout: int = 0
    _ahead: _Ahead | None = None
    _saved: ObjectRef | None = None
    _evaluation: _Ahead | None = None  # its rollout_id is how many rollouts the policy had trained

    def generate(self, rollout_id: int) -> ObjectRef:
        """The rollout that was begun in the call before; begins the next."""
        ahead = self._ahead if self._ahead is not None else self._begin(rollout_id)
        assert ahead.rollout_id == rollout_id
        with self.journal.phase("rollout_wait", "the engines to sample and the rewards"):
            result: RolloutResult = self._get(ahead.call, "a rollout")
        self.journal.rollout_metrics |= result.metrics
        if self.args.save is not None:  # whether it becomes part of a checkpoint may turn out later, by a signal
            self._saved = self.watchdog.watched(self.manager.save.remote(rollout_id))
        self._ahead = self._begin(rollout_id + 1) if rollout_id + 1 < self.num_rollout else None
        return result.batch

    def eval(self, num_trained: int) -> None:
        """Begin to evaluate; after the last rollout, wait for the end."""
        self._finish_evaluation()
        evaluation = self.watchdog.watched(self.manager.eval.remote(num_trained))
        self._evaluation = _Ahead(num_trained, evaluation)
        if self._ahead is None and num_trained == self.num_rollout:
            self.finish()

    def finish(self) -> None:
        """Wait until the engines have nothing to do: no rollout ahead, no evaluation."""
        self._finish_evaluation()
        if self._ahead is not None:
            with self.journal.phase("rollout_wait", "the engines to sample the next rollout"):
                self._get(self._ahead.call, "a rollout")

    def _finish_evaluation(self) -> None:
        if self._evaluation is None:
            return
        with self.journal.phase("eval", "the evaluation"):
            metrics: dict[str, float] = self._get(self._evaluation.call, "an evaluation")
        self.journal.evaluated(self._evaluation.rollout_id, metrics)
        self._evaluation = None

    def save(self, rollout_id: int) -> None:
        """`generate` has begun to."""
        assert self._saved is not None
        self._wait_for_save(self._saved)

    def _begin(self, rollout_id: int) -> _Ahead:
        call: ObjectRef = self.manager.generate.remote(rollout_id, self.weight_version)
        return _Ahead(rollout_id, self.watchdog.watched(call))


class ActorGroup:
    """All ranks of the actor, or of the critic.

    Each call goes to every rank and ends with the last, or with the first failure.
    """

    def __init__(self, args: Args, slots: Slots, run_dir: str, watchdog: Watchdog, *, role: Role) -> None:
        self.args = args
        self.watchdog = watchdog
        self.name = PROCESS_NAMES[role]
        bundles = slots.critic_bundles if role == "critic" else slots.trainer_bundles
        self.shares_node = slots.share_node(bundles)
        variables = {name: str(value) for name, value in args.train_env_vars.items()}
        environment = {"runtime_env": {"env_vars": variables}} if variables else {}
        self.ranks: list[ActorHandle] = [
            create_actor(TrainActor, args, rank, run_dir, role, options=slots.options(bundle, role) | environment)
            for rank, bundle in enumerate(bundles)
        ]
        self.ranks_per_node = max(Counter(slots.node_of[bundle] for bundle in bundles).values())
        for rank, actor in enumerate(self.ranks):
            watchdog.add(f"{self.name} {rank}", actor)

    def start(self, weights_dir: str) -> list[ObjectRef]:
        """Load the model on every rank. Returns calls that give the first rollout id.

        Actor and critic take turns, so that either has all the cores of a node.
        """
        call: ObjectRef = self.ranks[0].address.remote(loopback=self.shares_node)
        (address,) = self.watchdog.get([call], timeout_s=self.args.cluster_timeout_s, what=f"{self.name} 0 to start")
        num_threads = self.args.num_threads or max(1, (os.cpu_count() or 1) // self.ranks_per_node)
        return [rank.start.remote(address, num_threads, weights_dir) for rank in self.ranks]

    def train(self, rollout_id: int, batch: ObjectRef, values: ObjectRef | None) -> dict[str, float]:
        """One policy update. values: of a critic. Returns the metrics of rank 0."""
        calls = [rank.train.remote(rollout_id, batch, values) for rank in self.ranks]
        return self._all(calls, self.args.train_timeout_s, f"training on rollout {rollout_id}")[0]

    def token_kl(self, rollout_id: int, batch: ObjectRef) -> ObjectRef:
        """The policy's KL to the reference on the tokens of a rollout, in the object store."""
        calls = [rank.token_kl.remote(rollout_id, batch) for rank in self.ranks]
        return self._all(calls, self.args.train_timeout_s, f"the KL of rollout {rollout_id}")[0]

    def train_critic(self, rollout_id: int, batch: ObjectRef, kl: ObjectRef | None) -> CriticReport:
        """One update of the critic. Returns the report of rank 0."""
        calls = [rank.train_critic.remote(rollout_id, batch, kl) for rank in self.ranks]
        return self._all(calls, self.args.train_timeout_s, f"the critic to train on rollout {rollout_id}")[0]

    def update_weights(self, engine_urls: list[str | None], version: int) -> SendReport:
        """Send the weights to the engines."""
        calls = [rank.update_weights.remote(engine_urls, version) for rank in self.ranks]
        return self._all(calls, self.args.weight_sync_timeout_s, f"weights v{version} to reach the engines")[0]

    def write_weights(self, version: int) -> WeightFiles:
        """Write the weights to files: `version`, or a later one that the trainers have reached."""
        calls = [rank.write_weights.remote(version) for rank in self.ranks]
        timeout_s = self.args.train_timeout_s + self.args.weight_sync_timeout_s  # they may be in the middle of training
        return self._all(calls, timeout_s, f"weights v{version} to be written")[0]

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint."""
        calls = [rank.save.remote(rollout_id) for rank in self.ranks]
        self._all(calls, self.args.train_timeout_s, f"the {self.name}'s checkpoint of rollout {rollout_id}")

    def finish_save(self) -> None:
        """Wait for a checkpoint that is still being written."""
        calls = [rank.finish_save.remote() for rank in self.ranks]
        self._all(calls, self.args.train_timeout_s, f"the end of the {self.name}'s last save")

    def sleep(self) -> None:
        """Give device memory to the engines."""
        self._all(
            [rank.sleep.remote() for rank in self.ranks], self.args.train_timeout_s, f"every {self.name} to sleep"
        )

    def wake_up(self) -> None:
        """Take device memory back."""
        calls = [rank.wake_up.remote() for rank in self.ranks]
        self._all(calls, self.args.train_timeout_s, f"every {self.name} to wake up")

    def _all(self, calls: Sequence[ObjectRef], timeout_s: float, what: str) -> list[Any]:
        return self.watchdog.get(calls, timeout_s=timeout_s, what=what)


@dataclass
class PolicyHandle:
    """The trainers, as the loop sees them."""

    group: ActorGroup
    journal: Journal

    def train(self, rollout_id: int, batch: ObjectRef, values: ObjectRef | None = None) -> None:
        """One policy update on a rollout. values: of a critic."""
        with self.journal.phase("train", "the trainers"):
            metrics = self.group.train(rollout_id, batch, values)
        _note(self.journal, metrics)


@dataclass
class ActorCriticHandle:
    """The trainers and their critic, as the loop sees them."""

    args: Args
    policy: PolicyHandle
    critic: ActorGroup
    journal: Journal

    def train(self, rollout_id: int, batch: ObjectRef) -> None:
        """One update of the critic, and of the policy by the values from before it.

        The policy rests during the first --num-critic-only-steps rollouts.
        """
        with self.journal.phase("critic", "the critic"):
            kl = self.policy.group.token_kl(rollout_id, batch) if self.args.kl_coef > 0 else None
            metrics, values = self.critic.train_critic(rollout_id, batch, kl)
        _note(self.journal, metrics)
        if rollout_id >= self.args.num_critic_only_steps:
            self.policy.train(rollout_id, batch, values)


class NoPolicy:
    """--debug-rollout-only: nobody learns."""

    def train(self, rollout_id: int, batch: ObjectRef) -> None:
        """Nothing happens."""


def _note(journal: Journal, metrics: dict[str, float]) -> None:
    for key, value in metrics.items():
        target = journal.train_metrics if key.startswith("train/") else journal.rollout_metrics
        target[key] = value
