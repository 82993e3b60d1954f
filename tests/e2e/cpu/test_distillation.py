"""Runs with a teacher: behind an engine's address, and as a model of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.cpu.helpers.runs import Run, Starter
from tests.helpers.embedded_engine import running_engine
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

DISTIL = (
    "--advantage-estimator",
    "on_policy_distillation",
    "--num-rollout",
    "3",
    "--lr",
    "1e-2",
    "--rollout-temperature",
    "0.8",
)
THROUGH_ENGINE = ("--opd-type", "sglang", "--custom-rm-path", "slime.rollout.on_policy_distillation.reward_func")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another depth and other weights; the tokenizer is the student's."""
    return make_tiny_model(tmp_path_factory.mktemp("teacher") / "qwen3", num_hidden_layers=3, seed=7)


def _gaps(run: Run) -> list[float]:
    """The student's mean log-prob minus the teacher's, of each rollout: an estimate of the reverse KL."""
    steps = run.metrics("rollout/step")
    return [step["rollout/log_probs"] - step["rollout/teacher_log_probs"] for step in steps]


def test_a_teacher_teaches_the_same_as_an_engine_and_as_a_model_of_the_trainer(start: Starter, teacher: Path) -> None:
    with running_engine(teacher) as engine:
        address = ("--rm-url", f"{engine.url}/generate")
        remote = start(*DISTIL, *THROUGH_ENGINE, *address, name="remote").succeeds()
    local = start(*DISTIL, "--opd-teacher-load", str(teacher), name="local").succeeds()
    assert _gaps(remote) == pytest.approx(_gaps(local), rel=1e-3)
    assert _gaps(local)[2] < _gaps(local)[0]
    local.leaves_nothing(within_s=5)


def test_a_teacher_that_is_gone_is_named(start: Starter) -> None:
    run = start(*DISTIL, *THROUGH_ENGINE, "--rm-url", "http://127.0.0.1:9/generate", "--rm-timeout-s", "2")
    assert run.wait(120) == 1
    assert "127.0.0.1:9" in run.output()
    run.leaves_nothing()
