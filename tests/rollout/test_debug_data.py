"""Rollouts in files: what is read is what was sampled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.training import random_samples

from slime.data.batch import batch_from_samples
from slime.rollout.debug_data import NoPrompts, generate_rollout, load_rollout, save_rollout


def test_what_is_read_again_trains_the_same_bit_for_bit(tmp_path: Path) -> None:
    template = str(tmp_path / "deep" / "{rollout_id}.json")
    samples = random_samples(group_sizes=(2, 3))
    samples[0].reward = 0.1 + 0.2
    samples[1].metadata["note"] = {"ü": [1, None]}
    save_rollout(template, 7, [samples[:2], samples[2:]], weight_version=7)
    args = SimpleNamespace(
        load_debug_rollout_data=template,
        load_debug_rollout_data_subsample=None,
        num_data_ranks=1,
        num_steps_per_rollout=1,
    )
    groups = generate_rollout(args, 7, NoPrompts(args)).samples
    assert [len(group) for group in groups] == [2, 3]
    read = [sample for group in groups for sample in group]
    assert [sample.to_dict() for sample in read] == [sample.to_dict() for sample in samples]
    first, second = (batch_from_samples(part, [sample.reward for sample in part]) for part in (samples, read))
    for name in ("tokens", "loss_mask", "rollout_log_probs", "rewards", "group_ids"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_a_rollout_that_was_not_kept_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*/3\.json for rollout 3"):
        load_rollout(str(tmp_path / "{rollout_id}.json"), 3)
    (tmp_path / "4.json").write_text('{"samples": []}')
    with pytest.raises(ValueError, match=r"4\.json has no groups"):
        load_rollout(str(tmp_path / "{rollout_id}.json"), 4)


def test_files_have_nothing_to_evaluate_and_no_prompts() -> None:
    args = SimpleNamespace(load_debug_rollout_data="x")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        generate_rollout(args, 0, NoPrompts(args), evaluation=True)
    with pytest.raises(ValueError, match="no prompts to draw"):
        NoPrompts(args).get_samples(1)


def test_a_share_of_the_groups_is_read_spread_over_the_file(tmp_path: Path) -> None:
    template = str(tmp_path / "{rollout_id}.json")
    samples = random_samples(group_sizes=(2,) * 10)
    save_rollout(template, 0, [samples[2 * n : 2 * n + 2] for n in range(10)], weight_version=0)

    def read(share: float | None, num_data_ranks: int = 1) -> list[int | None]:
        args = SimpleNamespace(
            load_debug_rollout_data=template,
            load_debug_rollout_data_subsample=share,
            num_data_ranks=num_data_ranks,
            num_steps_per_rollout=2,
        )
        return [group[0].group_index for group in generate_rollout(args, 0, NoPrompts(args)).samples]

    every = [samples[2 * n].group_index for n in range(10)]
    assert read(None) == read(1.0) == every
    assert read(0.5) == every[::2]
    assert read(0.01) == every[:1]
    with pytest.raises(ValueError, match="--load-debug-rollout-data-subsample leaves 2 samples, the trainers need 4"):
        read(0.1, num_data_ranks=2)
