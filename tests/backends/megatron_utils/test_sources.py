"""Which critic goes with an actor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.training import settings_for

from slime.backends.megatron_utils.sources import critic_run
from slime.backends.shared.checkpoint import META, TRACKER, CheckpointError

HERE = '{"rollout_id": 3, "num_steps": 4, "schedule": {}}'


def checkpoint_in(folder: Path) -> str:
    """What is looked at of a checkpoint after rollout 3."""
    step = folder / "iter_0000003"
    step.mkdir(parents=True)
    (step / META).write_text(HERE)
    (step / "metadata.json").write_text("{}")
    (folder / TRACKER).write_text("3")
    return str(folder)


def test_a_critic_goes_on_where_its_actor_does(model: Path, tmp_path: Path) -> None:
    actor = checkpoint_in(tmp_path / "save")
    args = settings_for(model, advantage_estimator="ppo", save=actor, resume=True)
    with pytest.raises(CheckpointError, match="holds no critic of that rollout"):
        critic_run(args)
    own = checkpoint_in(tmp_path / "save" / "critic")
    assert (critic_run(args).load, critic_run(args).ckpt_step) == (own, 3)
    without = dataclasses.replace(args, resume=False, load=actor, critic_load=str(model))
    assert (critic_run(without).load, critic_run(without).ckpt_step) == (str(model), None)
