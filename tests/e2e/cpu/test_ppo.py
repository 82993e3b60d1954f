"""Runs with a critic: on the trainers' slots and on its own, from start to resume."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.cpu.helpers.checkpoints import differing, saved_state
from tests.e2e.cpu.helpers.runs import TRAINER, Run, Starter, wait_for

PPO = (
    *("--advantage-estimator", "ppo", "--kl-coef", "0.05", "--ref-update-interval", "1", "--normalize-advantages"),
    *("--num-steps-per-rollout", "2", "--lambd", "0.95", "--critic-lr", "1e-3", "--num-critic-only-steps", "1"),
)
OF_THE_CRITIC = {
    "train/value_loss", "train/value_clipfrac", "train/explained_variance", "train/critic_grad_norm",
    "train/critic_lr-pg_0",
}  # fmt: skip
OF_THE_ACTOR = {"train/loss", "train/pg_loss", "train/grad_norm", "train/lr-pg_0"}
pytestmark = pytest.mark.slow


def _parts(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name.startswith(prefix)}


def _checkpoints(folder: Path, step: int) -> dict[str, Any]:
    actor, critic = (saved_state(path / f"iter_{step:07d}") for path in (folder, folder / "critic"))
    return {f"actor.{name}": value for name, value in actor.items()} | {
        f"critic.{name}": value for name, value in critic.items()
    }


def _has_learned_as_it_should(run: Run) -> None:
    critic_only, both = run.metrics("train/step")[:2]
    assert critic_only.keys() >= OF_THE_CRITIC
    assert not critic_only.keys() & OF_THE_ACTOR
    assert both.keys() >= OF_THE_CRITIC | OF_THE_ACTOR
    for metrics in (critic_only, both):
        assert metrics["train/critic_grad_norm"] > 0
    assert both["train/grad_norm"] > 0


def test_a_critic_takes_turns_with_the_actor_on_its_slots_and_resumes_bit_for_bit(start: Starter) -> None:
    save = start.folder / "ckpt"
    flags = (*PPO, "--num-rollout", "3", "--save-interval", "1")
    run = start(*flags, "--save", str(save)).succeeds()
    _has_learned_as_it_should(run)
    states = [_checkpoints(save, step) for step in range(3)]
    moved = {name.rpartition(".")[0] for name in differing(states[0], states[1])}
    for part in ("actor.model", "actor.ref", "actor.optimizer", "critic.model", "critic.optimizer"):
        assert any(name.startswith(part) for name in moved), part
    assert states[0]["critic.model.model.head.weight"].any()  # the critic learned before the actor did
    weights, reference = (_parts(states[1], f"actor.{part}.") for part in ("model", "ref"))
    assert all(
        torch.equal(value, reference[name.replace("actor.model", "actor.ref", 1)]) for name, value in weights.items()
    )

    again = start.folder / "again"
    shutil.copytree(save, again)
    resumed = start(*flags, "--save", str(again), "--resume", "--ckpt-step", "1", name="resumed").succeeds()
    assert differing(states[2], _checkpoints(again, 2)) == []
    assert resumed.metrics("train/step")[-1] == run.metrics("train/step")[-1]
    resumed.leaves_nothing(within_s=5)

    shutil.rmtree(again / "critic" / "iter_0000000")
    refused = start(*flags, "--save", str(again), "--resume", "--ckpt-step", "0", name="refused")
    assert refused.wait(90) == 1
    assert f"iter_0000000, but {again}/critic holds no critic of that rollout" in refused.output()
    refused.leaves_nothing()


def test_a_critic_of_another_size_on_slots_of_its_own(start: Starter) -> None:
    save = start.folder / "ckpt"
    run = start(
        *PPO,
        *("--no-colocate", "--rollout-num-gpus", "1", "--critic-num-gpus-per-node", "2"),
        *("--critic-save", str(start.folder / "critic"), "--save", str(save)),
    ).succeeds()
    _has_learned_as_it_should(run)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert not (save / "critic").exists()
    shards = [list((folder / "iter_0000001" / "model").glob("*.distcp")) for folder in (save, start.folder / "critic")]
    assert [len(files) for files in shards] == [1, 2]  # one a rank
    run.leaves_nothing(within_s=5)


def test_a_critic_that_is_killed_is_named(start: Starter) -> None:
    run = start(*PPO, "--num-rollout", "1000")
    found = wait_for(lambda: run.processes(f"{TRAINER}.train_critic"), timeout_s=120, what="the critic at work")
    found[0].send_signal(signal.SIGKILL)
    assert run.wait(60) == 1
    assert "critic 0 (pid" in run.output()
    run.leaves_nothing()
