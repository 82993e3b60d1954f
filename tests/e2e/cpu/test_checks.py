"""Runs that watch over themselves: --ci-test and --true-on-policy-mode."""

from __future__ import annotations

import json

import pytest

from tests.e2e.cpu.helpers.runs import Starter

pytestmark = pytest.mark.slow

PLUGIN = '''
"""A trainer that writes down a variable, and a generation that forgets which weights sampled."""
import os
from pathlib import Path

from slime.rollout import sglang_rollout


def note(args, rollout_id, rollout_data):
    Path(args.run_dir, "environment").write_text(os.environ["MINE"])


async def forgets(args, sample, sampling_params):
    await sglang_rollout.generate(args, sample, sampling_params)
    sample.weight_versions = []
    return sample
'''
WATCHED = ("--ci-test", "--true-on-policy-mode", "--use-kl-loss", "--kl-loss-coef", "0.01", "--num-rollout", "2")


def test_a_run_that_is_right_passes_its_own_checks_and_another_is_compared_with_it(start: Starter) -> None:
    (start.folder / "mine.py").write_text(PLUGIN)
    norms = str(start.folder / "norms" / "{rollout_id}.json")
    flags = (*WATCHED, "--train-env-vars", '{"MINE": 7}', "--rollout-data-postprocess-path", "mine.note")
    run = start(*flags, "--ci-save-grad-norm", norms, cwd=start.folder).succeeds()
    assert (run.run_dir / "environment").read_text() == "7"
    saved = [json.loads((start.folder / "norms" / f"{number}.json").read_text())["grad_norm"] for number in (0, 1)]
    assert saved == [metrics["train/grad_norm"] for metrics in run.metrics("train/step")]
    (start.folder / "norms" / "1.json").write_text(json.dumps({"grad_norm": saved[1] * 1.1}))
    again = start(*flags, "--ci-load-grad-norm", norms, cwd=start.folder, name="again")
    assert again.wait() == 1
    assert "error: --ci-test: the gradient norm of rollout 1 is " in again.output()
    again.leaves_nothing()


def test_a_run_that_has_not_reached_its_metric_fails_at_its_end(start: Starter) -> None:
    run = start("--ci-test", "--ci-metric-checker-key", "rollout/raw_reward", "--ci-metric-checker-threshold", "2")
    assert run.wait() == 1
    assert "--ci-metric-checker-threshold is 2" in run.output()
    assert len(run.metrics()) == 2
    run.leaves_nothing()


def test_a_sample_of_unknown_weights_is_not_trained_on(start: Starter) -> None:
    (start.folder / "mine.py").write_text(PLUGIN)
    run = start("--true-on-policy-mode", "--custom-generate-function-path", "mine.forgets", cwd=start.folder)
    assert run.wait() == 1
    assert "sample 0 was sampled by no engine that names its version" in run.output()
    assert run.metrics("train/step") == []
    run.leaves_nothing()
