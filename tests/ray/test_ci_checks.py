"""The checks of --ci-test on the metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slime.arguments import Args
from slime.ray.ci_checks import CheckFailed, Checks

GOOD = {
    "train/grad_norm": 2.0,
    "train/ppo_kl": 0.0,
    "train/kl_loss": -2e-6,
    "train/train_rollout_logprob_abs_diff": 0.05,
}


def checks(**settings: Any) -> Checks:
    return Checks(Args(ci_test=True, num_steps_per_rollout=1, hf_checkpoint="/model", **settings))


def test_a_run_as_it_should_be_passes() -> None:
    run = checks()
    run.step(0, GOOD)
    run.step(1, GOOD | {"train/ppo_kl": 0.3, "train/kl_loss": 0.2})  # it has learned
    run.end()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train/ppo_kl": 0.01}, "train/ppo_kl of rollout 0 is 0.01, at most 0.001 is right"),
        ({"train/kl_loss": -0.02}, "train/kl_loss of rollout 0 is -0.02"),
        ({"train/kl_loss": float("nan")}, "train/kl_loss of rollout 0 is nan"),
        ({"train/train_rollout_logprob_abs_diff": 0.2}, "logprob_abs_diff of rollout 0 is 0.2, at most 0.1 is right"),
    ],
)
def test_a_number_that_is_wrong_stops_the_run(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(CheckFailed, match=message):
        checks().step(0, GOOD | wrong)


@pytest.mark.parametrize(
    "settings",
    [{"ci_disable_kl_checker": True}, {"load": "ckpt"}, {"ref_load": "/another"}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_first_kl_is_looked_at_where_it_must_be_zero(settings: dict[str, Any]) -> None:
    checks(**settings).step(0, GOOD | {"train/kl_loss": 0.2})


def test_with_several_steps_a_rollout_the_first_kl_says_nothing() -> None:
    Checks(Args(ci_test=True, num_steps_per_rollout=2)).step(0, GOOD | {"train/ppo_kl": 0.2})


def test_engine_and_trainer_are_compared_in_every_step() -> None:
    run = checks(ci_train_rollout_logprob_abs_diff_threshold=0.5)
    run.step(0, GOOD | {"train/train_rollout_logprob_abs_diff": 0.4})
    with pytest.raises(CheckFailed, match="of rollout 7 is 0.6, at most 0.5"):
        run.step(7, GOOD | {"train/train_rollout_logprob_abs_diff": 0.6})


def test_gradient_norms_of_two_runs_are_compared(tmp_path: Path) -> None:
    path = str(tmp_path / "norms" / "{rollout_id}.json")
    checks(ci_save_grad_norm=path).step(3, GOOD)
    assert json.loads((tmp_path / "norms" / "3.json").read_text()) == {"grad_norm": 2.0}
    again = checks(ci_load_grad_norm=path)
    again.step(3, GOOD | {"train/grad_norm": 2.01})
    with pytest.raises(CheckFailed, match="the gradient norm of rollout 3 is 2.1, in .*3.json it is 2"):
        again.step(3, GOOD | {"train/grad_norm": 2.1})
    with pytest.raises(CheckFailed, match="there is no file .*/4.json"):
        again.step(4, GOOD)


def test_a_metric_must_have_been_reached_once() -> None:
    run = checks(ci_metric_checker_key="eval/held", ci_metric_checker_threshold=0.9)
    with pytest.raises(CheckFailed, match="eval/held was never reported, --ci-metric-checker-threshold is 0.9"):
        run.end()
    run.note({"eval/held": 0.5})
    with pytest.raises(CheckFailed, match="eval/held was 0.5 at best"):
        run.end()
    run.note({"eval/held": 0.95})
    run.note({"eval/held": 0.6})
    run.end()


def test_rollouts_without_training_are_not_looked_at() -> None:
    checks().step(0, {"rollout/raw_reward": 1.0})
