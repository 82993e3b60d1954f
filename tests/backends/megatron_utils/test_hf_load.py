"""A rank reads its own part of a Hugging Face directory, a slice at a time."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import make_megatron
from helpers.model_families import write_tiny_model
from helpers.training import run_ranks, settings_for

from slime.backends.megatron_utils.names import HFDirectory


def counting(read: Any, asked: dict[str, int], most_alive: list[int]) -> Any:
    """`HFDirectory.read`, with a count of the bytes that it brings and of the slices that are there at once."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def counted(self: HFDirectory, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        part: torch.Tensor = read(self, name, axis, start, stop)
        asked[name] = asked.get(name, 0) + part.nbytes
        alive.add(part)
        most_alive.append(len(alive))
        return part

    return counted


def load_by_two(work: Path) -> None:
    with megatron_on_cpu(), pytest.MonkeyPatch.context() as patch:
        for family, layout in (
            ("qwen3", {"tensor_model_parallel_size": 2}),
            ("qwen3", {"pipeline_model_parallel_size": 2}),
            ("qwen3_moe", {"expert_model_parallel_size": 2}),
        ):
            asked: dict[str, int] = {}
            most_alive: list[int] = []
            with patch.context() as counted:
                counted.setattr(HFDirectory, "read", counting(HFDirectory.read, asked, most_alive))
                backend: Any = make_megatron(settings_for(work / family), **layout)
                backend.load()
            own = sum(tensor.nbytes for tensor in backend.chunk.weights().values())
            assert sum(asked.values()) == own  # and nothing that another rank holds
            whole = 4 * sum(math.prod(size) for size in HFDirectory(work / family).shapes.values())
            if layout == {"tensor_model_parallel_size": 2}:
                assert own < 0.55 * whole
            assert max(most_alive) <= 2  # the one before ends when the next is there


@pytest.mark.slow
def test_each_of_two_ranks_reads_what_it_holds_and_keeps_none_of_it(tmp_path: Path) -> None:
    for family in ("qwen3", "qwen3_moe"):
        write_tiny_model(family, tmp_path / family)
    run_ranks(load_by_two, 2, tmp_path, store=tmp_path / "store")
