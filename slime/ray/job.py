"""One run: everything it starts, in order, and ends, whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

import ray
import yaml
from ray import ObjectRef
from ray.actor import ActorHandle

from slime.arguments import Args, settings_as_dict
from slime.config import ConfigError
from slime.observability.progress import Progress
from slime.ray.actors import create_actor
from slime.ray.engine_command import resolve_engine
from slime.ray.engine_fleet import EngineFleet
from slime.ray.handles import ActorCriticHandle, ActorGroup, NoPolicy, PolicyHandle, RolloutAhead, RolloutHandle
from slime.ray.journal import Journal
from slime.ray.memory import Colocated, Disaggregated, EnginesOnly, Memory, NoEngines, UpdatedBetweenRollouts
from slime.ray.placement import Slots, allocate, start_ray, stays_on_machine
from slime.ray.rollout_manager import RolloutManager
from slime.ray.train_actor import Role
from slime.ray.watchdog import Watchdog
from slime.utils.logging import configure_logging
from slime.utils.misc import is_due
from slime.utils.processes import Terminated, owned_directory, sole_user
from slime.weight_sync.folder import checkpoint_bytes, weights_root

logger = logging.getLogger(__name__)

STOP_DEADLINE_S = 20.0


class Job:
    """A context manager: inside it `rollout`, `actor` and `memory` are up; after it no process is left."""

    rollout: RolloutHandle
    actor: PolicyHandle | ActorCriticHandle | NoPolicy
    memory: Memory
    manager: ActorHandle
    trainers: list[ActorGroup]  # the actor, and the critic where there is one
    journal: Journal
    start_rollout_id: int
    num_rollout: int

    def __init__(self, args: Args, *, is_async: bool = False) -> None:
        self.args = args
        self.is_async = is_async
        self.run_dir = run_directory(args)
        self.is_in_loop = False
        self.is_stopping = False
        self.saved_rollout_id: int | None = None
        self.watchdog = Watchdog()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Job:
        configure_logging(self.args.log_level)
        with self._stack:
            self._claim("--run-dir" if self.args.run_dir else "--save", self.run_dir)
            if self.args.save is not None and Path(self.args.save).resolve() != self.run_dir:
                self._claim("--save", Path(self.args.save))
            self.progress = self._stack.enter_context(Progress())
            with self.progress.phase("starting", "engines and trainers to start"):
                self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.__exit__(*exc_info)

    # --- start

    def _claim(self, flag: str, folder: Path) -> None:
        """Make `folder`, and write there alone until the end. Raises ConfigError where another run does."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._stack.enter_context(sole_user(folder))
        except BlockingIOError as error:
            raise ConfigError(
                f"{flag}: another run writes to {folder}. Wait for its end, or name another folder."
            ) from error

    def _start(self) -> None:
        """Everything slow starts at once: prompts, engines and trainers load while the others do."""
        begin = time.monotonic()
        logger.info("starting; run directory %s", self.run_dir)
        weights_dir = self._stack.enter_context(self._weights_directory())
        if start_ray(self.args):
            self._stack.callback(ray.shutdown)
        self._stack.enter_context(self._graceful_stop())  # after Ray, which sets a handler of its own
        logger.info("Ray is up after %.1f s", time.monotonic() - begin)
        slots = allocate(self.args)
        self._stack.callback(slots.release)
        self.args = resolve_engine(self.args, slots.device)
        if self.args.sglang_api_key is None and not stays_on_machine(self.args):
            self.args = dataclasses.replace(self.args, sglang_api_key=secrets.token_hex())
        self.manager = self._start_manager()
        prompts: ObjectRef = self.manager.prepare.remote()
        fleet = self._start_fleet(slots)
        engines = [] if fleet is None else [fleet.start.remote()]
        self.args = self._with_num_rollout(prompts)
        routers = None if fleet is None else fleet.router_addresses.remote()
        connected: ObjectRef = self.manager.set_runtime.remote(self.num_rollout, routers)
        self.trainers = [] if self.args.debug_rollout_only else self._create_trainers(slots)
        trainers = [call for group in self.trainers for call in group.start(str(weights_dir))]
        _, *answers = self.watchdog.get(
            [prompts, *trainers, *engines, connected],
            timeout_s=max(self.args.trainer_start_timeout_s, self.args.engine_start_timeout_s) + STOP_DEADLINE_S,
            what="engines and trainers to start",
        )
        first_rollout_id = answers[0] if trainers else 0
        self.start_rollout_id = first_rollout_id if self.args.start_rollout_id is None else self.args.start_rollout_id
        self._load_prompts(self.manager.load.remote(self.start_rollout_id - 1), "the data source to load")
        (self.run_dir / "args.yaml").write_text(yaml.safe_dump(self._settings(), sort_keys=False))
        self._open_handles(fleet)
        logger.info(
            "%s up after %.1f s", "trainers" if fleet is None else "trainers and engines", time.monotonic() - begin
        )
        if self.start_rollout_id >= self.num_rollout:
            logger.warning(
                "nothing is trained: %d rollouts are done, the run has %d (--num-rollout, --num-epoch)",
                self.start_rollout_id,
                self.num_rollout,
            )

    def _open_handles(self, fleet: ActorHandle | None) -> None:
        self.progress.begin(self.start_rollout_id, self.num_rollout)
        journal = Journal(
            self.args,
            self.run_dir,
            self.progress,
            settings=self._settings(),
            start_rollout_id=self.start_rollout_id,
        )
        self.journal = self._stack.enter_context(journal)
        self.rollout = self._open_rollout()
        if fleet is not None:
            self.watchdog.monitors.append(fleet.watch.remote())
        if not self.trainers:
            assert fleet is not None
            self.actor = NoPolicy()
            self.memory = EnginesOnly(self.args, fleet, self.watchdog)
            return
        actor, *critics = self.trainers
        policy = PolicyHandle(actor, journal)
        self.actor = ActorCriticHandle(self.args, policy, critics[0], journal) if critics else policy
        if fleet is None:
            self.memory = NoEngines()
            return
        self.watchdog.serve(fleet.weights_wanted.remote(), lambda version: _write_weights(actor, fleet, version))
        if self.args.rollout_external_engine_addrs is not None:
            self._stack.callback(actor.leave_engines)
        sleepers = [actor] if self.args.has_critic_slots else self.trainers
        parts = (self.args, fleet, actor, sleepers, self.rollout, self.watchdog, journal)
        if isinstance(self.rollout, RolloutAhead):
            self.memory = UpdatedBetweenRollouts(*parts, ahead=self.rollout, is_due=self._updates_to)
        else:
            self.memory = Colocated(*parts) if self.args.colocate else Disaggregated(*parts)

    def _open_rollout(self) -> RolloutHandle:
        parts = (self.args, self.manager, self.watchdog, self.journal)
        return RolloutAhead(*parts, num_rollout=self.num_rollout) if self.is_async else RolloutHandle(*parts)

    def _start_manager(self) -> ActorHandle:
        manager = create_actor(RolloutManager, self.args, str(self.run_dir))
        self._stack.callback(ray.kill, manager)
        self.watchdog.add("rollout manager", manager)
        return manager

    def _start_fleet(self, slots: Slots) -> ActorHandle | None:
        """None with --debug-train-only."""
        if self.args.debug_train_only:
            return None
        fleet = create_actor(EngineFleet, self.args, slots, str(self.run_dir))
        self._stack.callback(_stop_fleet, fleet)
        self.watchdog.actors["engine fleet"] = fleet
        return fleet

    def _create_trainers(self, slots: Slots) -> list[ActorGroup]:
        roles: list[Role] = ["actor", "critic"] if self.args.needs_critic else ["actor"]
        groups = [ActorGroup(self.args, slots, str(self.run_dir), self.watchdog, role=role) for role in roles]
        for rank in (rank for group in groups for rank in group.ranks):
            self._stack.callback(ray.kill, rank)
        return groups

    def _with_num_rollout(self, prompts: ObjectRef) -> Args:
        """--num-epoch as a number of rollouts, once the number of prompts is known."""
        args = self.args
        if args.num_rollout is None:
            assert args.num_epoch is not None
            assert args.rollout_batch_size is not None
            num_prompts = args.num_epoch * self._load_prompts(prompts, "the prompts to load")
            args = dataclasses.replace(args, num_rollout=max(1, num_prompts // args.rollout_batch_size))
        self.num_rollout = args.num_rollout or 0
        return args

    def _weights_directory(self) -> contextlib.AbstractContextManager[Path]:
        """Where the disk transport writes."""
        num_bytes = checkpoint_bytes(self.args.hf_checkpoint)
        root = weights_root(self.args.update_weight_disk_dir, self.run_dir, num_bytes=num_bytes)
        if self.args.update_weight_disk_keep_files:
            root.mkdir(parents=True, exist_ok=True)
            return contextlib.nullcontext(Path(tempfile.mkdtemp(prefix="slime-weights-", dir=root)))
        return owned_directory(root, prefix="slime-weights-")

    def _settings(self) -> dict[str, Any]:
        """What is written down of the settings: all but the key."""
        return settings_as_dict(dataclasses.replace(self.args, sglang_api_key=None))

    @contextlib.contextmanager
    def _graceful_stop(self) -> Iterator[None]:
        """On SIGTERM the loop ends after its current step; the job at once if none has begun or it takes too long."""

        def stop(*_: int | FrameType | None) -> None:
            if not self.is_in_loop:
                self.watchdog.interrupt(Terminated("SIGTERM before the first rollout: nothing to save"))
                return
            grace_s = self.args.shutdown_grace_s
            logger.warning("SIGTERM: saving at the next step boundary, within %g s", grace_s)
            self.is_stopping = True
            self.watchdog.interrupt(
                GraceExpired(
                    f"SIGTERM: no step boundary and checkpoint within --shutdown-grace-s {grace_s:g}. "
                    "With --save, --resume continues from the last complete checkpoint."
                ),
                after_s=grace_s,
            )

        previous = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    # --- what the loop asks

    def rollout_ids(self) -> Iterator[int]:
        """The rollouts to run; writes each down when it has ended, and ends early after SIGTERM, with a checkpoint."""
        self.is_in_loop = True
        for rollout_id in range(self.start_rollout_id, self.num_rollout):
            self.journal.begin_step()
            yield rollout_id
            is_last = self.is_stopping
            if is_last and self.args.save is not None and self.saved_rollout_id != rollout_id:
                self.memory.to_training()  # the signal came after that: the trainers may be asleep again
                self.save(rollout_id)
            if self.args.async_save and (is_last or rollout_id == self.num_rollout - 1):
                self._finish_saves()
            self.journal.end_step(rollout_id)
            if is_last:
                return
        self.journal.end_run()

    def evaluates_at_start(self) -> bool:
        """Whether to evaluate before the first rollout."""
        return self.args.eval_interval is not None and not self.args.skip_eval_before_train

    def evaluates_after(self, rollout_id: int) -> bool:
        """Whether to evaluate after `rollout_id`."""
        is_last = rollout_id == self.num_rollout - 1
        interval = self.args.eval_interval
        return interval is not None and not self.is_stopping and (is_last or is_due(rollout_id, interval))

    def _updates_to(self, version: int) -> bool:
        """Whether engines take `version`: the first, every --update-weights-interval, and where it is evaluated."""
        is_first = version == self.start_rollout_id
        return is_first or is_due(version - 1, self.args.update_weights_interval) or self.evaluates_after(version - 1)

    def saves_after(self, rollout_id: int) -> bool:
        """Whether to write a checkpoint after `rollout_id`: at the interval, at the end, and when told to stop."""
        due = is_due(rollout_id, self.args.save_interval, self.num_rollout)
        return self.args.save is not None and (due or self.is_stopping)

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint: data source, critic, and last the actor, whose tracker makes it complete."""
        with self.journal.phase("save", "the checkpoint"):
            self.rollout.save(rollout_id)
            for group in reversed(self.trainers):
                group.save(rollout_id)
        self.saved_rollout_id = rollout_id

    def _finish_saves(self) -> None:
        with self.journal.phase("save", "the last checkpoint"):
            for group in self.trainers:
                group.finish_save()

    def _load_prompts(self, ref: ObjectRef, what: str) -> Any:
        return self.watchdog.get([ref], timeout_s=self.args.trainer_start_timeout_s, what=what)[0]


class GraceExpired(RuntimeError):
    """SIGTERM came, and the step and its checkpoint did not end in time."""


def _write_weights(actor: ActorGroup, fleet: ActorHandle, version: int) -> ObjectRef:
    """For an engine that is to be started with weights that lie in no file. Returns the next such request."""
    logger.info("writing weights v%d for an engine that is to be started", version)
    fleet.weights_written.remote(version, actor.write_weights(version))
    return cast(ObjectRef, fleet.weights_wanted.remote())


def _stop_fleet(fleet: ActorHandle) -> None:
    """Let the fleet end its processes; killed with them if it does not answer."""
    ray.wait([fleet.stop.remote()], timeout=STOP_DEADLINE_S)
    ray.kill(fleet)


def run_directory(args: Args) -> Path:
    """--run-dir, else --save, else a new folder below runs/."""
    name = args.run_dir or args.save or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return Path(name).resolve()
