"""The groups of one rollout: drawn, filtered, and those that are left over ended and kept for the next one.

drawn      a b c d e f      --over-sampling-batch-size 6
finished   c a f            c is dropped by --dynamic-sampling-filter-path
kept       a f              --rollout-batch-size 2: complete, the engines are told to end b, d and e
buffered   b d e            --partial-rollout; otherwise they are discarded
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from slime.rollout.abort import abort
from slime.rollout.data_source import DataSource
from slime.rollout.filter_hub.base_types import (
    MetricGatherer,
    call_dynamic_filter,
    should_drop_dynamic_filter_output,
)
from slime.rollout.state import GenerateState, RolloutFailed
from slime.utils.misc import load_function
from slime.utils.types import Sample, SampleStatus

logger = logging.getLogger(__name__)

Groups = list[list[Sample]]
RunGroup = Callable[[list[Sample]], Coroutine[Any, Any, list[Sample]]]


class Collected(NamedTuple):
    """kept: groups to train on, without failed samples, in the order they were drawn. finished: dropped ones too."""

    kept: Groups
    finished: Groups
    metrics: dict[str, float]


async def collect_groups(args: Any, data_source: DataSource, state: GenerateState, run_group: RunGroup) -> Collected:
    """Draw groups and run them until --rollout-batch-size of them are kept, or the data source has no more.

    A group of which every sample failed takes its place and is left out. Raises RolloutFailed where more samples
    failed, or more groups were dropped, than allowed; ValueError where there was no group at all.
    """
    collection = _Collection(args, data_source, state, run_group)
    try:
        await collection.fill()
        await collection.end_rest()
    finally:
        await collection.close()
    return collection.result()


class _Collection:
    """One rollout under way. Owns the tasks of its groups."""

    def __init__(self, args: Any, data_source: DataSource, state: GenerateState, run_group: RunGroup) -> None:
        self.args = args
        self.data_source = data_source
        self.state = state
        self.run_group = run_group
        path = args.dynamic_sampling_filter_path
        self.filter = None if path is None else load_function(path)
        self.drops = MetricGatherer()
        self.done: asyncio.Queue[asyncio.Task[list[Sample]]] = asyncio.Queue()
        self.kept: dict[int, list[Sample]] = {}  # by place
        self.dropped: dict[int, list[Sample]] = {}
        self.num_drawn = self.num_samples = self.num_continued = 0
        self.rest_metrics: dict[str, float] = {}
        self.is_exhausted = False

    @property
    def num_missing(self) -> int:
        """Groups still to be kept."""
        return int(self.args.rollout_batch_size) - len(self.kept)

    async def fill(self) -> None:
        """Draw and take in until nothing is missing."""
        while self.num_missing > 0:
            if len(self.state.pendings) < self.num_missing and not self.is_exhausted:
                self._draw()
            if not self.state.pendings:
                break
            task = await self.done.get()
            self._take(self.state.pendings.pop(task), task.result())
        if self.num_drawn == 0:
            raise ValueError("the data source gave no samples: its end is reached, or its get_samples returns nothing")
        if self.num_missing > 0:
            logger.warning(
                "the data source has no more samples: %d of %d groups", len(self.kept), self.args.rollout_batch_size
            )

    def _draw(self) -> None:
        """Start the next prompts, those of the buffer first."""
        groups = self.data_source.get_samples(self.args.over_sampling_batch_size) or []
        self.is_exhausted = not groups
        if self.num_drawn and groups:
            logger.info("%d groups missing, %s dropped: drawing on", self.num_missing, self.drops.drops.total())
        for group in groups:
            self.num_samples += len(group)
            self.num_continued += sum(map(_is_begun, group))
            if self.args.mask_offpolicy_in_partial_rollout:
                _mask_begun(group)
            task = asyncio.create_task(self.run_group(group))
            self.state.pendings[task] = self.num_drawn
            task.add_done_callback(self.done.put_nowait)
            self.num_drawn += 1

    def _take(self, place: int, group: list[Sample]) -> None:
        """Keep a finished group, or drop it."""
        self._check_failures()
        usable = [sample for sample in group if sample.status is not SampleStatus.FAILED]
        output = call_dynamic_filter(self.filter if usable else None, self.args, usable)
        is_insufficient = len(self.state.pendings) < self.num_missing
        if should_drop_dynamic_filter_output(output, is_insufficient=is_insufficient):
            self.dropped[place] = group
            self.drops.on_dynamic_filter_drop(output.reason)
            self._check_drops()
        else:
            self.kept[place] = group

    def _check_failures(self) -> None:
        state, fraction = self.state, self.args.max_failed_fraction
        if state.num_failed > fraction * self.num_samples:
            raise RolloutFailed(
                f"{state.num_failed} of {self.num_samples} samples failed, --max-failed-fraction allows "
                f"{fraction:g}; the first: {state.first_failure}"
            )

    def _check_drops(self) -> None:
        num_dropped = len(self.dropped)
        if num_dropped > self.args.dynamic_sampling_max_drop_ratio * self.args.rollout_batch_size:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.drops.drops.most_common(5))
            raise RolloutFailed(
                f"--dynamic-sampling-filter-path dropped {num_dropped} groups ({reasons}) and kept {len(self.kept)} "
                f"of {self.args.rollout_batch_size}; --dynamic-sampling-max-drop-ratio allows no more. Are the prompts "
                "too hard or too easy for the model?"
            )

    async def end_rest(self) -> None:
        """End the groups that are still under way; with --partial-rollout the data source takes them back."""
        if not self.state.pendings:
            return
        groups = await abort(self.args, self.state.rollout_id, state=self.state)
        num_tokens = sum(sample.response_length for group in groups for sample in group)
        if self.args.partial_rollout:
            self.data_source.add_samples(groups)
            self.rest_metrics = {"rollout/partial/buffered_groups": float(len(groups))}
            self.rest_metrics["rollout/partial/buffered_tokens"] = float(num_tokens)
        else:
            self.rest_metrics = {"rollout/over_sampling/discarded_groups": float(len(groups))}
            self.state.num_lost_tokens += num_tokens

    async def close(self) -> None:
        """Cancel whatever still runs."""
        for task in self.state.pendings:
            task.cancel()
        await asyncio.gather(*self.state.pendings, return_exceptions=True)

    def result(self) -> Collected:
        """What has been collected, failed samples left out of the groups that are kept."""
        kept = [
            [sample for sample in self.kept[place] if sample.status is not SampleStatus.FAILED]
            for place in sorted(self.kept)
        ]
        finished = self.kept | self.dropped
        failed = self.state.num_failed
        metrics = {"rollout/failed": failed / max(1, self.num_samples), "rollout/num_failed": float(failed)}
        metrics |= self.drops.collect() | self.rest_metrics
        if self.rest_metrics or self.state.num_lost_tokens:
            metrics["rollout/over_sampling/discarded_tokens"] = float(self.state.num_lost_tokens)
        if self.args.partial_rollout:
            metrics["rollout/partial/continued_samples"] = float(self.num_continued)
        return Collected([group for group in kept if group], [finished[place] for place in sorted(finished)], metrics)


def _mask_begun(group: list[Sample]) -> None:
    """What an interrupted response has already is not trained on."""
    for sample in group:
        if _is_begun(sample):
            sample.loss_mask = [0] * sample.response_length


def _is_begun(sample: Sample) -> bool:
    return sample.status is SampleStatus.ABORTED and sample.response_length > 0
