"""Dumps of a run, a step repeated from them, and runs of which one half is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slime.rollout.debug_data import load_rollout
from tests.e2e.cpu.helpers.runs import KEEP_ENVIRONMENT, PLUGINS, ROOT, TRAIN_ASYNC, TRAINER, Starter

pytestmark = pytest.mark.slow


def replayed(run_dir: Path, rollout_id: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slime.cli.main", "replay", str(run_dir), "--rollout-id", str(rollout_id)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{PLUGINS}", **KEEP_ENVIRONMENT},
        cwd=run_dir,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_step_is_repeated_from_the_dumps_of_a_run_bit_for_bit(start: Starter) -> None:
    dumps, save = start.folder / "details", start.folder / "save"
    run = start(
        *("--num-rollout", "3", "--dump-details", str(dumps), "--save", str(save), "--save-interval", "1"),
        *(
            "--lr-decay-style",
            "linear",
            "--num-steps-per-rollout",
            "2",
            "--entropy-coef",
            "0.01",
            "--actor-num-gpus-per-node",
            "2",
        ),
    ).succeeds()
    again = replayed(run.run_dir, 2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the same, bit for bit" in again.stdout and "train/loss" in again.stdout
    first, second = (np.load(folder / "train_data" / "2_0.npz") for folder in (dumps, run.run_dir / "replay_2"))
    assert set(first) == set(second) and "advantages" in first
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_a_step_of_a_run_with_a_critic_is_repeated_with_the_critic(start: Starter) -> None:
    dumps, save = start.folder / "details", start.folder / "save"
    run = start(
        *("--num-rollout", "3", "--dump-details", str(dumps), "--save", str(save), "--save-interval", "1"),
        *("--advantage-estimator", "ppo", "--kl-coef", "0.05", "--lambd", "0.95", "--normalize-advantages"),
        *("--critic-lr", "1e-3", "--num-critic-only-steps", "1", "--num-steps-per-rollout", "2"),
    ).succeeds()
    again = replayed(run.run_dir, 2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the same, bit for bit" in again.stdout
    assert all(name in again.stdout for name in ("train/loss", "train/value_loss", "train/critic_grad_norm"))
    trained = sorted(path.name for path in (run.run_dir / "replay_2" / "train_data").iterdir())
    assert trained == ["2_0.npz"]  # from the checkpoint of rollout 1, not from the beginning


def test_a_step_of_a_run_that_sampled_ahead_is_repeated_by_the_plain_loop(start: Starter) -> None:
    run = start(
        *("--num-rollout", "4", "--dump-details", str(start.folder / "details"), "--use-tis"),
        *("--no-colocate", "--rollout-num-gpus", "1", "--update-weights-interval", "2"),
        command=TRAIN_ASYNC,
    ).succeeds()
    assert run.metrics()[3]["rollout/staleness/max"] > 0
    again = replayed(run.run_dir, 3)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the same, bit for bit" in again.stdout and "train/loss" in again.stdout


def test_without_trainers_engines_sample_from_the_checkpoint_and_samples_are_kept(start: Starter) -> None:
    template = str(start.folder / "kept" / "{rollout_id}.json")
    run = start("--debug-rollout-only", "--save-debug-rollout-data", template).reaches("metrics.jsonl")
    assert run.processes(TRAINER) == []
    run.succeeds()
    for rollout_id in (0, 1):
        groups = load_rollout(template, rollout_id)
        assert [len(group) for group in groups] == [4, 4]
        assert [s.tokens for group in groups for s in group] == [s["tokens"] for s in run.samples(rollout_id)]
    assert len(run.metrics()) == 2
    run.leaves_nothing(within_s=10)
    trained = start("--load-debug-rollout-data", template, "--no-colocate", name="trained").succeeds()
    assert [m["rollout/raw_reward"] for m in trained.metrics()] == [m["rollout/raw_reward"] for m in run.metrics()]


def test_engines_alone_also_sample_ahead(start: Starter) -> None:
    flags = ("--debug-rollout-only", "--no-colocate", "--rollout-num-gpus", "1", "--num-rollout", "3")
    run = start(*flags, "--log-passrate", "--log-multi-turn", command=TRAIN_ASYNC).succeeds()
    indices = [[sample["index"] for sample in run.samples(rollout_id)] for rollout_id in range(3)]
    assert indices == [list(range(8 * number, 8 * number + 8)) for number in range(3)]
    for metrics in run.metrics():
        assert 0 <= metrics["rollout/pass@1"] <= metrics["rollout/pass@4"] <= 1
        assert metrics["rollout/multi_turn/turns/mean"] == 1
    run.leaves_nothing(within_s=10)
