"""When checkpoints are written: at once, or by a thread from a copy on the host while the run goes on."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from slime.backends.shared.checkpoint import CheckpointError
from slime.backends.shared.offload import HostBuffer, snapshot
from slime.config.run import RunConfig
from slime.weight_sync.disk import write_hf_directory

StateT = TypeVar("StateT")
Write = Callable[[StateT, dist.ProcessGroup | None], None]


class Saver:
    """One checkpoint at a time. All ranks make the same calls; is_writer: this one writes what is not sharded."""

    def __init__(self, run: RunConfig, *, is_writer: bool) -> None:
        self.run = run
        self.is_writer = is_writer
        self._group: dist.ProcessGroup | None = None
        self._under_way: Future[None] | None = None
        if run.async_save and run.save is not None:
            timeout = datetime.timedelta(seconds=run.train_timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)  # the thread's own: training talks meanwhile
            self._thread = ThreadPoolExecutor(1, "checkpoint")
            self._buffer = HostBuffer()

    def save(
        self, rollout_id: int, state: StateT, *, write: Write[StateT], tensors: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Have `write(state, group)` write a checkpoint once the save before is through, and --save-hf `tensors`.

        state: a nest of containers; with --async-save a copy of its tensors is written. tensors: under Hugging Face
        names; gathering them is a collective.
        """
        self.finish()
        if self._group is None:
            self._write(rollout_id, partial(write, state, None), tensors)
            return
        held = self._held(tensors) if self.run.save_hf is not None else []
        copied = partial(write, snapshot(state, self._buffer), self._group)
        self._under_way = self._thread.submit(self._write, rollout_id, copied, held)

    def check(self) -> None:
        """Raise the failure of a save that has failed meanwhile: CheckpointError or OSError."""
        if self._under_way is not None and self._under_way.done():
            self.finish()

    def finish(self) -> None:
        """Wait for a save under way; raises its failure, and CheckpointError where it takes too long."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        try:
            under_way.result(self.run.train_timeout_s)
        except TimeoutError as error:
            limit = f"{self.run.train_timeout_s:g} s (--train-timeout-s)"
            raise CheckpointError(f"the checkpoint in {self.run.save} was not written within {limit}") from error

    def _held(self, tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """On the writer's host."""
        return [(name, tensor.to("cpu", copy=True)) for name, tensor in tensors if self.is_writer]

    def _write(self, rollout_id: int, write: Callable[[], None], tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self.run.save_hf is not None:
            directory = Path(self.run.save_hf.format(rollout_id=rollout_id))
            write_hf_directory(
                tensors, directory, assets=self.run.hf_checkpoint, is_writer=self.is_writer, is_durable=True
            )
        write()
