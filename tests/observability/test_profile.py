from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import settings_for

from slime.config.base import ConfigError
from slime.observability.profile import MemoryHistory, PhaseProfiler
from slime.observability.timer import PhaseTimer


def operations(path: Path) -> set[str]:
    with gzip.open(path, "rt") as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def run(timer: PhaseTimer, profiler: PhaseProfiler) -> None:
    """Three rollouts, as a trainer times them."""
    for rollout_id in range(3):
        timer.rollout_id = rollout_id
        with profiler.phase("train"):
            with profiler.phase("ref_log_probs"):
                torch.randn(4).sin()
            with profiler.phase("actor_train"):
                torch.randn(4).cos()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["train_overall"], {"train": {"aten::sin", "aten::cos"}}),
        (["train_actor", "train_log_probs"], {"ref_log_probs": {"aten::sin"}, "actor_train": {"aten::cos"}}),
        (["train_overall", "train_actor"], {"train": {"aten::sin", "aten::cos"}}),
    ],
)
def test_the_phases_of_the_targets_are_traced_in_the_rollouts_meant(
    tmp_path: Path, targets: list[str], expected: dict[str, set[str]]
) -> None:
    timer = PhaseTimer(None, process="trainer 0")
    run(timer, PhaseProfiler(timer, tmp_path, targets=targets, rollouts=range(1, 2), rank=3))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_000001_rank_0003.json.gz" for name in expected}
    for name, found in expected.items():
        ours = operations(tmp_path / f"{name}_000001_rank_0003.json.gz")
        assert ours & {"aten::sin", "aten::cos"} == found
    assert timer.collect().keys() == {"perf/train_time", "perf/ref_log_probs_time", "perf/actor_train_time"}


def test_a_phase_that_fails_leaves_no_trace_and_the_next_is_traced(tmp_path: Path) -> None:
    timer = PhaseTimer(None, process="trainer 0")
    profiler = PhaseProfiler(timer, tmp_path, targets=["train_overall"], rollouts=range(5), rank=0)
    with pytest.raises(RuntimeError, match="diverged"), profiler.phase("train"):
        raise RuntimeError("diverged")
    assert list(tmp_path.iterdir()) == []
    with profiler.phase("train"):
        torch.zeros(1)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_memory_history(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--record-memory-history is of a GPU's memory, and there is none"):
        MemoryHistory(tmp_path, rank=0, num_steps=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_snapshot_num_steps": 3}, "--memory-snapshot-num-steps has no effect without --record-memory-history"),
        (
            {"memory_snapshot_num_steps": 0, "record_memory_history": True},
            "--memory-snapshot-num-steps must be above 0",
        ),
        ({"profile_step_start": 5, "profile_step_end": 5}, "--profile-step-end must be above --profile-step-start 5"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_for("unread", **settings)
