"""Faults in partial and in asynchronous runs: nothing lost, nothing doubled, no hang."""

from __future__ import annotations

import json
import signal
from typing import Any

import psutil
import pytest

from tests.e2e.cpu.helpers.runs import ENGINE, ROUTER, TRAIN, TRAIN_ASYNC, Run, Starter

pytestmark = pytest.mark.slow

MANAGER = "ray::RolloutManager"
APART = ("--no-colocate", "--rollout-num-gpus", "1")
FULLY_ASYNC = (*APART, "--rollout-function-path", "recorder.fully_async")
LENGTHS = ("--custom-generate-function-path", "recorder.long_or_short", "--rollout-max-response-len", "150")
PARTIAL = ("--over-sampling-batch-size", "4", "--partial-rollout")
MODES = [(PARTIAL, TRAIN), (FULLY_ASYNC, TRAIN), (APART, TRAIN_ASYNC)]
WITHIN_S = 300.0  # of any run here: what is shown is that nothing hangs


def saved(start: Starter) -> tuple[str, ...]:
    return ("--num-rollout", "4", "--save", str(start.folder / "ckpt"), "--save-interval", "1")


def trained_and_buffered(start: Starter, run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples of all rollouts, and those that the last checkpoint keeps for later."""
    trained = [sample for rollout_id in range(4) for sample in run.samples(rollout_id)]
    (state,) = start.folder.glob("ckpt/rollout/*dict_3.pt")
    return trained, [sample for group in json.loads(state.read_text())["buffer"] for sample in group]


def has_every_sample_once(start: Starter, run: Run, *, lost: tuple[int, ...] = ()) -> bool:
    """Whether every sample that was drawn is trained on or waits, with as many tokens as it shall have."""
    trained, buffered = trained_and_buffered(start, run)
    indices = sorted([sample["index"] for sample in trained + buffered] + list(lost))
    assert indices == list(range(len(indices)))
    assert len(trained) == 32 - len(lost)
    for sample in trained:
        assert sample["response_length"] == (4 if sample["index"] % 8 < 4 else 150)
        assert len(sample["rollout_log_probs"]) == sample["response_length"] < len(sample["tokens"])
        assert sample["reward"] is not None
    return True


@pytest.mark.parametrize("part", [ROUTER, ENGINE])
def test_what_is_killed_in_a_partial_rollout_costs_no_sample(start: Starter, part: str) -> None:
    run = start(*PARTIAL, *LENGTHS, *saved(start)).reaches("in_flight/4")
    run.the_process(part).send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert has_every_sample_once(start, run)
    run.leaves_nothing()


@pytest.mark.parametrize(
    ("part", "fault"), [(ENGINE, signal.SIGKILL), (ENGINE, signal.SIGSTOP), (ROUTER, signal.SIGKILL)]
)
def test_what_dies_as_a_rollout_is_aborted_costs_no_sample(start: Starter, part: str, fault: signal.Signals) -> None:
    run = start(
        *(*PARTIAL, *LENGTHS, *saved(start), "--rollout-health-check-timeout", "5"),
        *("--dynamic-sampling-filter-path", "recorder.keeps_the_rollout_from_ending"),
    ).reaches("ending")
    run.the_process(part).send_signal(fault)  # one that is stopped takes the order to abort and does not answer
    (run.run_dir / "may_end").touch()
    run.succeeds(WITHIN_S)
    assert has_every_sample_once(start, run)
    assert run.metrics()[0]["rollout/partial/buffered_groups"] == 2
    run.leaves_nothing()


def test_an_engine_killed_while_trainers_train_is_told_which_version_the_weights_are_that_it_gets(
    start: Starter,
) -> None:
    flags = (*APART, *LENGTHS, *saved(start), "--update-weight-transport", "distributed")
    run = start(*flags, "--num-steps-per-rollout", "8", command=TRAIN_ASYNC).reaches("record_000000.json")
    run.the_process(ENGINE).send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert has_every_sample_once(start, run)
    assert "writing weights v0 for an engine that is to be started" in run.output()
    versions = [sample["weight_versions"] for sample in run.samples(1)]
    assert {version for sample in versions for version in sample} <= {"0", "1"}
    assert all(sample == sorted(sample) for sample in versions)
    run.leaves_nothing()


@pytest.mark.parametrize(("mode", "command"), MODES)
def test_a_rollout_process_that_is_killed_ends_the_run_and_a_resumed_one_has_every_sample(
    start: Starter, mode: tuple[str, ...], command: tuple[str, ...]
) -> None:
    flags = (*mode, *LENGTHS, *saved(start))
    first = start(*flags, command=command).reaches("../ckpt/iter_0000001").reaches("in_flight/*")
    manager = first.the_process(MANAGER)
    manager.send_signal(signal.SIGKILL)
    assert first.wait(WITHIN_S) == 1, first.output()
    assert f"rollout manager (pid {manager.pid}) died" in first.output() and "--resume" in first.output()
    first.leaves_nothing()
    run = start(*flags, "--resume", command=command).succeeds(WITHIN_S)
    assert has_every_sample_once(start, run)
    run.leaves_nothing()


@pytest.mark.parametrize(("mode", "command"), MODES)
def test_a_reward_process_that_is_killed_fails_its_sample_and_no_other(
    start: Starter, mode: tuple[str, ...], command: tuple[str, ...]
) -> None:
    scoring = ("--custom-rm-path", "recorder.scores_in_a_process", "--max-failed-fraction", "0.25")
    run = start(*mode, *LENGTHS, *saved(start), *scoring, command=command).reaches("scoring_*")
    (flag,) = run.run_dir.glob("scoring_*")
    psutil.Process(int(flag.name.removeprefix("scoring_"))).kill()
    run.succeeds(WITHIN_S)
    assert has_every_sample_once(start, run, lost=(5,))
    assert sum(metrics["rollout/num_failed"] for metrics in run.metrics()) == 1
    assert "sample 5" in run.output() and "its process ended while it ran" in run.output()
    run.leaves_nothing()
