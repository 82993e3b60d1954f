"""When checkpoints are written: at once, or by a thread from a copy on the host while the run goes on."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from slime.backends.fsdp_utils import checkpoint
from slime.backends.fsdp_utils.checkpoint import CheckpointError, Content
from slime.backends.shared.offload import HostBuffer, snapshot
from slime.config.run import RunConfig
from slime.training.backend import NamedTensor
from slime.weight_sync.disk import write_hf_directory


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

    def save(self, content: Content, tensors: Iterable[NamedTensor]) -> None:
        """Write `content` and, with --save-hf, `tensors`, once the save before is through."""
        self.finish()
        if self._group is None:
            self._write(content, tensors)
            return
        held = self._held(tensors) if self.run.save_hf is not None else []
        content = content._replace(parts=snapshot(content.parts, self._buffer))
        self._under_way = self._thread.submit(self._write, content, held)

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

    def _held(self, tensors: Iterable[NamedTensor]) -> list[NamedTensor]:
        """On the writer's host; gathering is a collective."""
        return [NamedTensor(name, tensor.to("cpu", copy=True)) for name, tensor in tensors if self.is_writer]

    def _write(self, content: Content, tensors: Iterable[NamedTensor]) -> None:
        assert self.run.save is not None
        if self.run.save_hf is not None:
            directory = Path(self.run.save_hf.format(rollout_id=content.meta.rollout_id))
            write_hf_directory(
                tensors, directory, assets=self.run.hf_checkpoint, is_writer=self.is_writer, is_durable=True
            )
        checkpoint.save(self.run.save, content, group=self._group)
