"""Rollouts that never stop: engines sample the next batches while trainers train, across weight updates.

`generate_rollout_fully_async` goes to --rollout-function-path, under `slime train` or `train_async.py`. Groups are
sampled by tasks that outlive the call; a call hands out the oldest batch. Batches take groups in the order in which
they were begun, so that long responses are trained on as often as short ones, and how far ahead groups are begun is
bounded. With B prompts a rollout and S = --max-weight-staleness, once engines hold version v:

    begun:  every group of the rollouts up to v + S, that is B (S + 1) groups that are not trained on yet

Rollout N is trained on by version N and its groups are begun at version N - S or later: no sample is older than S, and
memory is bounded. Weights change in the middle of a response: engines pause, take them, and go on.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from slime.rollout.background import report_failure
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.data_source import DataSource, RolloutDataSourceWithBuffer
from slime.rollout.hooks import filter_samples, process_all_samples
from slime.rollout.sglang_rollout import GENERATED, eval_rollout, generate_and_rm_group
from slime.rollout.state import GenerateState, RolloutFailed, rare_collection
from slime.utils.async_utils import run
from slime.utils.types import Sample, SampleStatus

logger = logging.getLogger(__name__)

DEFAULT_STALENESS = 2


def generate_rollout_fully_async(
    args: Any,
    rollout_id: int,
    data_source: DataSource,
    evaluation: bool = False,
    *,
    weight_version: int | None = None,
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The oldest batch of the groups under way, or an evaluation beside them.

    weight_version: what the engines hold (default: `rollout_id`, as in a run that updates them after every rollout).
    Raises RolloutFailed where more samples of the batch failed than allowed.
    """
    with rare_collection(args):
        if evaluation:
            return run(eval_rollout(args, rollout_id))
        version = rollout_id if weight_version is None else weight_version
        return run(_next_batch(args, rollout_id, data_source, version))


async def stop(data_source: DataSource) -> None:
    """End all groups under way that were taken from `data_source`."""
    queue = _queues.pop(data_source, None)
    if queue is not None:
        await queue.close()


async def _next_batch(args: Any, rollout_id: int, data_source: DataSource, weight_version: int) -> RolloutFnTrainOutput:
    queue = _queues.get(data_source)
    if queue is None:
        queue = _queues[data_source] = GroupQueue(args, rollout_id)
        _save_with(data_source, queue)
    ahead = DEFAULT_STALENESS if args.max_weight_staleness is None else args.max_weight_staleness
    last = max(rollout_id, weight_version + ahead)
    queue.begin(data_source, last if args.num_rollout is None else min(last, args.num_rollout - 1))
    return await queue.take(rollout_id, data_source)


def _save_with(data_source: DataSource, queue: GroupQueue) -> None:
    """Have checkpoints of the data source hold what is under way."""
    if isinstance(data_source, RolloutDataSourceWithBuffer):
        data_source.under_way = queue.not_taken
    else:
        logger.warning(
            "%s does not save groups under way: after --resume their prompts are skipped. Derive it from "
            "RolloutDataSourceWithBuffer.",
            type(data_source).__name__,
        )


@dataclass(frozen=True)
class UnderWay:
    """One group. prompts: as they came from the data source."""

    prompts: list[Sample]
    task: asyncio.Task[list[Sample]]

    @property
    def samples(self) -> list[Sample] | None:
        """What it has become; None while that is not known, and where its task did not come to its end."""
        is_finished = self.task.done() and not self.task.cancelled() and self.task.exception() is None
        return self.task.result() if is_finished else None


class GroupQueue:
    """Groups under way, oldest first; all of it happens in one event loop, but for `not_taken`."""

    def __init__(self, args: Any, first_rollout_id: int) -> None:
        self.args = args
        self.groups: deque[UnderWay] = deque()
        self.num_begun = first_rollout_id * args.rollout_batch_size
        self.taken_at = time.monotonic()

    def begin(self, data_source: DataSource, last_rollout_id: int) -> None:
        """Begin what is missing of the rollouts up to `last_rollout_id`."""
        wanted = (last_rollout_id + 1) * self.args.rollout_batch_size - self.num_begun
        for group in data_source.get_samples(wanted) if wanted > 0 else []:
            state = GenerateState(self.args, self.num_begun // self.args.rollout_batch_size)
            task = asyncio.create_task(self._sample(group, state))
            task.add_done_callback(self._report_failure)
            self.groups.append(UnderWay(copy.deepcopy(group), task))
            self.num_begun += 1

    async def take(self, rollout_id: int, data_source: DataSource) -> RolloutFnTrainOutput:
        """The oldest batch, once it is done; samples that failed are left out. Raises ValueError where there is none,
        as soon as it is known RolloutFailed, and whatever generation raised."""
        batch = self._batch(0)
        if not batch:
            raise ValueError(f"the data source gave no prompts for rollout {rollout_id}")
        num_failed = await self._wait_for(batch)
        for _ in batch:
            self.groups.popleft()
        groups = [group.task.result() for group in batch]
        metrics = self._metrics(groups, num_failed)
        usable = [[sample for sample in group if sample.status is not SampleStatus.FAILED] for group in groups]
        kept = [group for group in usable if group]
        filter_samples(self.args, kept)
        process_all_samples(self.args, groups, data_source)
        return RolloutFnTrainOutput(kept, metrics)

    def _batch(self, first: int) -> list[UnderWay]:
        """The groups of one rollout, from place `first` on; fewer where the data source ended."""
        return list(itertools.islice(self.groups, first, first + self.args.rollout_batch_size))

    def not_taken(self) -> list[list[Sample]]:
        """Every group that was begun and not taken: done with its rewards, else its prompts, to be sampled anew."""
        return [group.prompts if group.samples is None else group.samples for group in self.groups]

    async def close(self) -> None:
        """End what is under way."""
        tasks = [group.task for group in self.groups]
        self.groups.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, group: list[Sample], state: GenerateState) -> list[Sample]:
        if all(sample.status in GENERATED for sample in group):  # out of a checkpoint
            return group
        return await generate_and_rm_group(self.args, group, state.sampling_params, state=state)

    async def _wait_for(self, batch: list[UnderWay]) -> int:
        """How many samples of the batch failed."""
        for task in asyncio.as_completed([group.task for group in batch]):
            if _has_failed(await task):
                self._check_failures(batch)
        return len(_failed(batch))

    def _report_failure(self, task: asyncio.Task[list[Sample]]) -> None:
        """Make known, long before its batch is asked for, that a group has failed, or one too many of its batch."""
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            report_failure(error)
        elif _has_failed(task.result()):
            self._report_too_many(task)

    def _report_too_many(self, task: asyncio.Task[list[Sample]]) -> None:
        place = next((place for place, group in enumerate(self.groups) if group.task is task), 0)
        first = place - place % self.args.rollout_batch_size  # the oldest group begins a batch
        try:
            self._check_failures(self._batch(first))
        except RolloutFailed as failure:
            report_failure(failure)

    def _check_failures(self, batch: list[UnderWay]) -> None:
        """Raises RolloutFailed where more samples have failed than allowed."""
        failed, num_samples = _failed(batch), sum(len(group.prompts) for group in batch)
        if len(failed) > self.args.max_failed_fraction * num_samples:
            raise RolloutFailed(
                f"{len(failed)} of {num_samples} samples failed, --max-failed-fraction allows "
                f"{self.args.max_failed_fraction:g}; one of them: {failed[0].metadata.get('failure')}"
            )

    def _metrics(self, groups: list[list[Sample]], num_failed: int) -> dict[str, float]:
        """Failures, what else is under way, and the rate at which tokens have come since the batch before."""
        now = time.monotonic()
        seconds, self.taken_at = now - self.taken_at, now
        samples = [sample for group in groups for sample in group]
        rate = sum(sample.effective_response_length for sample in samples) / max(seconds, 1e-9)
        return {
            "rollout/failed": num_failed / max(1, len(samples)),
            "rollout/num_failed": num_failed,
            "rollout/under_way/groups": len(self.groups),
            "rollout/under_way/done": sum(group.task.done() for group in self.groups),
            "perf/tokens_per_sec": rate,
            "perf/tokens_per_gpu_per_sec": rate / max(1, self.args.rollout_num_gpus or 1),
        }


def _has_failed(group: list[Sample]) -> bool:
    return any(sample.status is SampleStatus.FAILED for sample in group)


def _failed(batch: list[UnderWay]) -> list[Sample]:
    """The samples of finished groups that failed."""
    return [sample for group in batch for sample in group.samples or [] if sample.status is SampleStatus.FAILED]


# A run has one data source; what was taken from it and not trained on lives as long as it does.
_queues: weakref.WeakKeyDictionary[DataSource, GroupQueue] = weakref.WeakKeyDictionary()
