"""One trainer rank: an actor that holds a TrainBackend and runs the recipe on it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ray

from slime.arguments import Args
from slime.data.batch import TrainBatch
from slime.engine.client import EngineClient
from slime.observability.timer import PhaseTimer
from slime.ray.actors import CONTROL, LIFETIME
from slime.ray.watchdog import thread_stacks, wait_for_the_end
from slime.utils.http_utils import find_free_port
from slime.utils.logging import configure_logging

if TYPE_CHECKING:
    import torch

    from slime.training.backend import TrainBackend

logger = logging.getLogger(__name__)


class SendReport(NamedTuple):
    """directory: where the version lies. failed: addresses of engines that did not take it."""

    directory: str
    failed: list[str]


def _fsdp(args: Args, device: torch.device) -> TrainBackend:
    from slime.backends.fsdp_utils.backend import FSDPBackend

    return FSDPBackend(args, args, device)


_BACKENDS: dict[str, Callable[[Args, torch.device], TrainBackend]] = {"fsdp": _fsdp}


class TrainActor:
    """Rank `rank` of `args.num_trainers`. Every rank gets the same calls in the same order."""

    def __init__(self, args: Args, rank: int, run_dir: str) -> None:
        configure_logging(args.log_level)
        self.args = args
        self.rank = rank
        self.run_dir = Path(run_dir)

    def address(self, *, loopback: bool) -> str:
        """`host:port` at which this rank can be found, for a rendezvous; by this machine only, or by others too."""
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        return f"{host}:{find_free_port(host)}"

    def start(self, address: str, num_threads: int, weights_dir: str) -> int:
        """Join the world, load model and optimizer. Returns the first rollout id to run."""
        import torch

        from slime.training.recipe import Recipe
        from slime.utils.distributed import init_process_group, pick_device
        from slime.weight_sync.disk import DiskTransport

        torch.set_num_threads(num_threads)
        device = pick_device(self.args.device)
        backend = self.args.distributed_backend
        init_process_group(
            backend=("nccl" if device.type == "cuda" else "gloo") if backend == "auto" else backend,
            rank=self.rank,
            world_size=self.args.num_trainers,
            address=address,
            timeout_minutes=self.args.distributed_timeout_minutes,
        )
        self.backend = _BACKENDS[self.args.train_backend](self.args, device)
        is_reporter = self.backend.layout.is_reporter
        self.timer = PhaseTimer(self.run_dir if is_reporter else None, process=f"trainer {self.rank}")
        self.recipe = Recipe(
            self.backend, self.args, self.args, dump_dir=self.run_dir / "skipped_steps", phase=self.timer.phase
        )
        self.transport = DiskTransport(Path(weights_dir), assets=self.args.hf_checkpoint, is_writer=is_reporter)
        first_rollout_id = self.backend.load()
        self._begin_wait(first_rollout_id)
        return first_rollout_id

    def train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        """One policy update. Returns `train/*`, `rollout/*`, `perf/*` metrics, the same on each rank but for times."""
        self.wait.close()
        with self.timer.phase("train"):
            metrics = self.recipe.train(rollout_id, batch)
        times = self.timer.collect()
        self._begin_wait(rollout_id + 1)
        num_tokens = float(batch.total_lengths.sum())
        return metrics | times | {"perf/actor_train_tok_per_s": num_tokens / times["perf/actor_train_time"]}

    def _begin_wait(self, rollout_id: int) -> None:
        """From now until training on `rollout_id` this rank waits."""
        self.timer.rollout_id = rollout_id
        self.wait = contextlib.ExitStack()
        self.wait.enter_context(self.timer.phase("train_wait"))

    def update_weights(self, engine_urls: list[str], version: int) -> SendReport:
        """Bring the engines to `version`. A collective; the reporter's answer counts."""
        from slime.weight_sync.update import send_weights

        engines = [EngineClient(url, self.args.sglang_api_key) for url in engine_urls]
        failed = send_weights(
            self.backend.hf_tensors(),
            self.transport,
            engines,
            version=version,
            timeout_s=self.args.weight_sync_timeout_s / 2,  # before the driver's, so that a lost engine is told to it
            check_equal=self.args.check_weight_update_equal,
        )
        return SendReport(str(self.transport.path_of(version).resolve()), failed)

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint."""
        self.backend.save(rollout_id)

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
