"""One rank of the actor or the critic: a Ray actor that holds a TrainBackend and runs the recipe on it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import ray
from ray import ObjectRef

from slime.arguments import Args
from slime.config.run import critic_settings
from slime.data.batch import Array, TrainBatch
from slime.observability.flops import training_flops
from slime.observability.timer import PhaseTimer
from slime.ray.actors import CONTROL, LIFETIME
from slime.ray.current_weights import WeightFiles
from slime.ray.engine_command import engine_client, transport_kind
from slime.ray.watchdog import thread_stacks, wait_for_the_end
from slime.utils.logging import configure_logging
from slime.utils.malloc import keep_freed_memory
from slime.utils.misc import load_function

if TYPE_CHECKING:
    import torch

    from slime.training.backend import TrainBackend
    from slime.training.recipe import Phase
    from slime.weight_sync.update import Transport

logger = logging.getLogger(__name__)

Role = Literal["actor", "critic"]
PROCESS_NAMES: dict[Role, str] = {"actor": "trainer", "critic": "critic"}
_PHASES: dict[Role, str] = {"actor": "train", "critic": "critic"}


class SendReport(NamedTuple):
    """directory: where the version lies, if in a file. failed: addresses of engines that did not take it."""

    directory: str | None
    failed: list[str]


class CriticReport(NamedTuple):
    """metrics: `train/*`, `perf/*`. values: from before the update, in the object store; the reporter's only."""

    metrics: dict[str, float]
    values: ObjectRef | None


def _fsdp(args: Args, device: torch.device, role: Role) -> TrainBackend:
    from slime.backends.fsdp_utils.backend import FSDPBackend
    from slime.backends.fsdp_utils.sources import critic_run

    return FSDPBackend(critic_run(args) if role == "critic" else args, args, device, role=role)


def _megatron(args: Args, device: torch.device, role: Role) -> TrainBackend:
    from slime.backends.megatron_utils.start import open_backend

    return open_backend(args, args, device, torch_compile=args.torch_compile, role=role)


_BACKENDS: dict[str, Callable[[Args, torch.device, Role], TrainBackend]] = {"fsdp": _fsdp, "megatron": _megatron}


class TrainActor:
    """Rank `rank` of the actor or of the critic. Every rank of a role gets the same calls in the same order."""

    def __init__(self, args: Args, rank: int, run_dir: str, role: Role) -> None:
        configure_logging(args.log_level)
        keep_freed_memory()
        self.args = args
        self.rank = rank
        self.run_dir = Path(run_dir)
        self.role = role
        self.num_trained = 0  # rollouts: the version of the weights
        self.listener: socket.socket | None = None  # of rank 0, for the others to meet at

    def address(self, *, loopback: bool) -> str:
        """`host:port` at which this rank can be found, for a rendezvous; by this machine only, or by others too."""
        from slime.utils.distributed import open_listener

        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        self.listener = open_listener(host)
        return f"{host}:{self.listener.getsockname()[1]}"

    def start(self, address: str, num_threads: int, weights_dir: str) -> int:
        """Join the world, load model and optimizer. Returns the first rollout id to run."""
        import torch

        from slime.observability.counters import Counters
        from slime.utils.distributed import communication, init_process_group, pick_device, use_nccl_as_sglang_does

        torch.set_num_threads(num_threads)
        device = pick_device(self.args.device)
        if transport_kind(self.args, device.type) == "distributed":
            use_nccl_as_sglang_does()
        cpu_backend = self.args.fsdp_cpu_backend if self.args.fsdp_cpu_offload else None
        init_process_group(
            backend=communication(self.args.distributed_backend, device, cpu_backend=cpu_backend),
            rank=self.rank,
            world_size=self.args.num_critics if self.role == "critic" else self.args.num_trainers,
            address=address,
            timeout_minutes=self.args.distributed_timeout_minutes,
            listener=self.listener,
        )
        self.backend = _BACKENDS[self.args.train_backend](self.args, device, self.role)
        self.is_reporter = self.backend.layout.is_reporter
        process = f"{PROCESS_NAMES[self.role]} {self.rank}"
        self.timer = PhaseTimer(self.run_dir if self.is_reporter else None, process=process)
        self.counters = Counters()
        self.phase = self._profiled_phase()
        if self.role == "critic":
            self._open_critic()
        else:
            self._open_actor(Path(weights_dir), device)
        first_rollout_id = self.backend.load()
        self._begin_wait(first_rollout_id)
        return first_rollout_id

    def _profiled_phase(self) -> Phase:
        """What times phases and, with --use-pytorch-profiler, traces some; the critic's are not."""
        from slime.observability.profile import MemoryHistory, PhaseProfiler

        args, is_critic = self.args, self.role == "critic"
        folder = Path(args.memory_snapshot_dir or self.run_dir / "memory")
        self.memory_history = None
        if args.record_memory_history and not is_critic:
            self.memory_history = MemoryHistory(folder, rank=self.rank, num_steps=args.memory_snapshot_num_steps)
        if not args.use_pytorch_profiler or is_critic:
            return self.timer.phase
        rollouts = range(args.profile_step_start, args.profile_step_end)
        profiler = PhaseProfiler(
            self.timer, self.run_dir / "profile", targets=args.profile_target, rollouts=rollouts, rank=self.rank
        )
        return profiler.phase

    def _open_actor(self, weights_dir: Path, device: torch.device) -> None:
        from slime.training.recipe import Recipe
        from slime.weight_sync.disk import DiskTransport

        self._model_config = json.loads((Path(self.args.hf_checkpoint) / "config.json").read_text())
        dump_dir = self.run_dir / "skipped_steps"
        self.recipe = Recipe(
            self.backend,
            self.args,
            self.args,
            dump_dir=dump_dir,
            phase=self.phase,
            train_dump=self.args.save_debug_train_data,
        )
        hook = self.args.custom_update_weight_post_write_path
        self.files = DiskTransport(
            weights_dir,
            assets=self.args.hf_checkpoint,
            is_writer=self.is_reporter,
            keep=self.args.update_weight_disk_keep_files,
            after_write=None if hook is None else partial(load_function(hook), self.args),
        )
        self.transport = self._transport(device)

    def _transport(self, device: torch.device) -> Transport:
        from slime.weight_sync.distributed import DistributedTransport
        from slime.weight_sync.tensor import TensorTransport

        buffer_size = self.args.update_weight_buffer_size
        match transport_kind(self.args, device.type):
            case "tensor":
                size = self.args.policy_engine_size
                assert size is not None, "engines of the policy have no trainers of their own on their GPUs"
                return TensorTransport(rank=self.rank, ranks_per_engine=size, bucket_bytes=buffer_size)
            case "distributed":
                return DistributedTransport(is_sender=self.is_reporter, device=device, bucket_bytes=buffer_size)
            case "disk":
                return self.files

    def _open_critic(self) -> None:
        from slime.training.critic import CriticRecipe

        settings = critic_settings(self.args)
        self.critic = CriticRecipe(self.backend, algorithm=self.args, optimizer=settings, phase=self.timer.phase)

    # --- training

    def train(self, rollout_id: int, batch: TrainBatch, values: Array | None = None) -> dict[str, float]:
        """One policy update. Returns `train/*`, `rollout/*`, `perf/*` metrics, the same on each rank but for times.

        values: a critic's, one a response token.
        """
        self.counters.collect()
        with self._working(rollout_id):
            metrics = self.recipe.train(rollout_id, dataclasses.replace(batch, values=values))
        self.num_trained = rollout_id + 1
        times = self.timer.collect() | self.counters.collect()
        self._begin_wait(rollout_id + 1)
        if self.memory_history is not None:
            self.memory_history.trained(rollout_id)
        times["perf/micro_batches"] = float(self.recipe.num_micro_batches)
        return metrics | times | self._speed(batch, times["perf/actor_train_time"])

    def _speed(self, batch: TrainBatch, seconds: float) -> dict[str, float]:
        """Tokens a second of all ranks, and the model's operations a second of each, in 10^12."""
        speed = {"perf/actor_train_tok_per_s": float(batch.total_lengths.sum()) / seconds}
        flops = training_flops(self._model_config, batch.total_lengths, batch.response_lengths)
        if flops is not None:
            speed["perf/actor_train_tflops"] = flops / self.args.num_trainers / seconds / 1e12
        return speed

    def token_kl(self, rollout_id: int, batch: TrainBatch) -> ObjectRef | None:
        """The policy's KL to the reference, one number a response token, in the object store; the reporter's only."""
        with self._working(rollout_id):
            kl = self.recipe.token_kl(rollout_id, batch)
        self._begin_wait(rollout_id)
        return ray.put(kl) if self.is_reporter else None

    def train_critic(self, rollout_id: int, batch: TrainBatch, kl: Array | None) -> CriticReport:
        """One update of the critic. kl: what `token_kl` returned, with --kl-coef."""
        with self._working(rollout_id):
            update = self.critic.train(rollout_id, dataclasses.replace(batch, kl=kl))
        times = self.timer.collect()
        self._begin_wait(rollout_id + 1)
        return CriticReport(update.metrics | times, ray.put(update.values) if self.is_reporter else None)

    @contextlib.contextmanager
    def _working(self, rollout_id: int) -> Iterator[None]:
        """This rank's share of the time of `rollout_id`; before it, it waited."""
        self._wait.close()
        self.timer.rollout_id = rollout_id
        with self.phase(_PHASES[self.role]):
            yield

    def _begin_wait(self, rollout_id: int) -> None:
        """From now until it works on `rollout_id` this rank waits."""
        self.timer.rollout_id = rollout_id
        self._wait = contextlib.ExitStack()
        self._wait.enter_context(self.timer.phase(f"{_PHASES[self.role]}_wait"))

    # --- weights

    def update_weights(self, engine_urls: list[str | None], version: int) -> SendReport:
        """Bring the engines to `version`. A collective; the reporter's answer counts."""
        from slime.weight_sync.update import send_weights

        engines = [None if url is None else engine_client(self.args, url) for url in engine_urls]
        checks = self.args.check_weight_update_equal
        files = Path(self.write_weights(version).directory) if checks and self.transport is not self.files else None
        failed = send_weights(
            self.backend.hf_tensors(),
            self.transport,
            engines,
            version=version,
            timeout_s=self.args.weight_sync_timeout_s / 2,  # before the driver's, so that a lost engine is told to it
            check_equal=checks,
            is_reporter=self.is_reporter,
            files=files,
        )
        if self.args.keep_old_actor:
            self.backend.copy_weights("actor", "old_actor")
        path = self.transport.path_of(version)
        return SendReport(None if path is None else str(path.resolve()), failed)

    def write_weights(self, version: int) -> WeightFiles:
        """Write the weights to files: `version`, or what it was trained to since. Older ones go. A collective."""
        version = max(version, self.num_trained)
        path = self.files.write(self.backend.hf_tensors(), version)
        if self.is_reporter:
            self.files.delete_before(version)
        return WeightFiles(version, str(path.resolve()))

    def leave_engines(self) -> None:
        """End what is kept between updates for the engines' sake."""
        from slime.utils.async_utils import run
        from slime.weight_sync.distributed import DistributedTransport

        if isinstance(self.transport, DistributedTransport):
            run(self.transport.close())

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint."""
        self.backend.save(rollout_id)

    def finish_save(self) -> None:
        """Wait for a checkpoint that is still being written."""
        self.backend.finish_save()

    def sleep(self) -> None:
        """Give device memory to the engines."""
        self.backend.sleep()

    def wake_up(self) -> None:
        """Take device memory back."""
        self.backend.wake_up()

    def pid(self) -> int:
        """Process id, for tests and debuggers."""
        return os.getpid()

    @ray.method(concurrency_group=CONTROL)
    def stacks(self) -> str:
        """What every thread is doing."""
        return thread_stacks()

    @ray.method(concurrency_group=LIFETIME)
    def live(self) -> None:
        """Does not return: the call fails when this process dies, whatever else the driver waits for."""
        wait_for_the_end()
