"""The plug-ins that `benchmarks.overhead` turns on: each does as little as it can, so that slime's part is measured."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from slime.arguments import Args
from slime.rollout.data_source import DataSource
from slime.rollout.sglang_rollout import generate
from slime.utils.types import Sample

NUM_ENGINES = 64


async def generate_at_engine_of_sample(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """--custom-generate-function-path: slime's own, at one of 64 engines without a router; they take turns."""
    return await generate(_at_engine(args, (sample.index or 0) % NUM_ENGINES), sample, sampling_params)


@functools.lru_cache(maxsize=NUM_ENGINES)
def _at_engine(args: Args, number: int) -> Args:
    return dataclasses.replace(args, sglang_router_ip=f"127.0.0.{number + 1}")


async def generate_with_note(args: Args, sample: Sample, sampling_params: dict[str, Any], evaluation: bool) -> Sample:
    """--custom-generate-function-path: slime's own, and an entry in the metadata."""
    sample = await generate(args, sample, sampling_params, evaluation=evaluation)
    sample.metadata["evaluation"] = evaluation
    return sample


def _coin(sample: Sample) -> float:
    """1.0 or 0.0: differs within a group, and is the same in each tenth one, which dynamic sampling then drops."""
    return float((sample.index or 0) % 2 or (sample.group_index or 0) % 10 == 0)


async def reward_here(args: Args, sample: Sample) -> dict[str, Any]:
    """--custom-rm-path, async: runs in the event loop, under its deadline."""
    return {"score": _coin(sample), "length": sample.response_length}


def reward_in_worker(args: Args, sample: Sample) -> dict[str, Any]:
    """--custom-rm-path, synchronous: runs in a worker process, which sends back what it writes into the metadata."""
    sample.metadata["seen"] = True
    return {"score": _coin(sample), "length": sample.response_length}


def hook(args: Args, sample: Sample, *, rollout_id: int, evaluation: bool) -> None:
    """--rollout-sample-hook-path."""
    sample.train_metadata = {"rollout_id": rollout_id}


def take_first(args: Args, rollout_id: int | None, buffer: list[list[Sample]], num_samples: int) -> list[list[Sample]]:
    """--buffer-filter-path."""
    groups = buffer[:num_samples]
    del buffer[:num_samples]
    return groups


def remove_every_eighth(args: Args, groups: list[list[Sample]]) -> None:
    """--rollout-sample-filter-path."""
    for group in groups:
        group[0].remove_sample = True


def count_all(args: Args, all_groups: list[list[Sample]], data_source: DataSource) -> None:
    """--rollout-all-samples-process-path."""
    for group in all_groups:
        assert all(sample.reward is not None for sample in group)
