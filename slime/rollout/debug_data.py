"""Rollouts written to files and read again: `--save-debug-rollout-data` and `--load-debug-rollout-data`.

A file holds `{"rollout_id", "weight_version", "groups": [[sample, ...], ...]}`, all numbers exactly as they were:
training on what was read is training on what was sampled, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slime.rollout.base_types import RolloutFnTrainOutput
from slime.rollout.data_source import DataSource, Groups
from slime.rollout.state_file import read_state, write_state
from slime.utils.types import Sample


def dump_path(template: str, rollout_id: int) -> Path:
    """The file of one rollout."""
    return Path(template.format(rollout_id=rollout_id))


def save_rollout(template: str, rollout_id: int, groups: Groups, *, weight_version: int) -> Path:
    """Write the samples of a rollout, whole or not at all; returns the file.

    Raises ValueError, naming the entry, for what a plug-in put into a sample that is neither JSON nor an array.
    """
    path = dump_path(template, rollout_id)
    samples = [[sample.to_dict() for sample in group] for group in groups]
    write_state(path, {"rollout_id": rollout_id, "weight_version": weight_version, "groups": samples})
    return path


def existing_dump(template: str, rollout_id: int) -> Path:
    """As `dump_path`. Raises ValueError where there is no such file."""
    path = dump_path(template, rollout_id)
    if not path.is_file():
        raise ValueError(f"--load-debug-rollout-data: there is no file {path} for rollout {rollout_id}")
    return path


def load_rollout(template: str, rollout_id: int) -> Groups:
    """The groups that `save_rollout` wrote. Raises ValueError where the file is missing or holds something else."""
    path = existing_dump(template, rollout_id)
    state = read_state(path)
    if "groups" not in state:
        raise ValueError(f"--load-debug-rollout-data: {path} has no groups of samples")
    return [[Sample.from_dict(sample) for sample in group] for group in state["groups"]]


def subsampled(groups: Groups, share: float | None) -> Groups:
    """That share of the groups (one at least), evenly spread; None: all."""
    count = len(groups) if share is None else max(1, round(share * len(groups)))
    return [groups[number * len(groups) // count] for number in range(count)]


def generate_rollout(
    args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """The rollout function of --load-debug-rollout-data."""
    if evaluation:
        raise ValueError("--load-debug-rollout-data has nothing to evaluate. Leave out --eval-interval.")
    groups = load_rollout(args.load_debug_rollout_data, rollout_id)
    kept = subsampled(groups, args.load_debug_rollout_data_subsample)
    num_samples = sum(map(len, kept))
    needed = min(args.num_data_ranks * (args.num_steps_per_rollout or 1), sum(map(len, groups)))
    if num_samples < needed:
        raise ValueError(
            f"--load-debug-rollout-data-subsample leaves {num_samples} samples, the trainers need {needed}: raise it"
        )
    return RolloutFnTrainOutput(kept)


class NoPrompts(DataSource):
    """The data source of --load-debug-rollout-data: nothing is drawn, nothing to remember."""

    def __init__(self, args: Any) -> None:
        pass

    def __len__(self) -> int:
        return 0

    def get_samples(self, num_samples: int) -> Groups:
        raise ValueError("--load-debug-rollout-data reads rollouts from files: there are no prompts to draw")

    def add_samples(self, samples: Groups) -> None:
        raise ValueError("--load-debug-rollout-data reads rollouts from files: no samples are taken back")

    def save(self, rollout_id: int) -> None:
        """Nothing to save."""

    def load(self, rollout_id: int | None = None) -> None:
        """Nothing to load."""
