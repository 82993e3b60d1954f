"""Engines that sample while trainers train: one rollout ahead, and without ever stopping."""

from __future__ import annotations

import signal

import pytest

from tests.e2e.cpu.helpers.runs import ENGINE, TRAIN, TRAIN_ASYNC, Run, Starter, wait_for

APART = ("--no-colocate", "--rollout-num-gpus", "1")
FULLY_ASYNC = (*APART, "--rollout-function-path", "recorder.fully_async")
pytestmark = pytest.mark.slow


def versions(run: Run, rollout_id: int) -> set[int]:
    return {int(version) for sample in run.samples(rollout_id) for version in sample["weight_versions"]}


def indices(run: Run, rollout_id: int) -> list[int]:
    return [sample["index"] for sample in run.samples(rollout_id)]


def test_train_async_samples_one_rollout_ahead_and_evaluates_every_version_asked_for(start: Starter) -> None:
    run = start(
        *(*APART, "--num-rollout", "4", "--max-weight-staleness", "1", "--save", str(start.folder / "ckpt")),
        *("--eval-interval", "2", "--eval-prompt-data", "held", f"{start.prompts}@[:4]"),
        command=TRAIN_ASYNC,
    ).succeeds()
    assert [versions(run, rollout_id) for rollout_id in range(4)] == [{0}, {0}, {1}, {2}]
    assert [indices(run, rollout_id) for rollout_id in range(4)] == [list(range(8 * n, 8 * n + 8)) for n in range(4)]
    assert [metrics["rollout/staleness/mean"] for metrics in run.metrics()] == [0, 1, 1, 1]
    assert [metrics["rollout/staleness/count_1"] for metrics in run.metrics()[1:]] == [8, 8, 8]
    assert len(run.metrics("eval/step")) == 3  # of versions 0, 2 and 4
    run.leaves_nothing(within_s=5)


def test_weights_are_updated_at_the_interval_and_a_resumed_run_skips_no_prompt(start: Starter) -> None:
    save = ("--save", str(start.folder / "ckpt"), "--save-interval", "1", "--update-weights-interval", "2")
    flags = (*APART, *save, "--num-rollout", "5")
    tracker = start.folder / "ckpt" / "latest_checkpointed_iteration.txt"
    first = start(*flags, command=TRAIN_ASYNC)
    wait_for(lambda: tracker.is_file() and tracker.read_text() == "1", timeout_s=120, what="the checkpoint of step 1")
    first.process.send_signal(signal.SIGTERM)
    first.succeeds()
    saved = int(tracker.read_text())
    run = start(*flags, "--resume", command=TRAIN_ASYNC).succeeds()
    assert [indices(run, rollout_id) for rollout_id in range(5)] == [list(range(8 * n, 8 * n + 8)) for n in range(5)]
    sampled_by = [versions(run, rollout_id) for rollout_id in range(5)]
    expected = [{0}, {0}, {0}, {2}, {2}]
    assert sampled_by[: saved + 1] == expected[: saved + 1]
    assert sampled_by[saved + 1] == {saved + 1}  # the first rollout of a run is sampled by the newest weights
    assert all(metrics["rollout/staleness/max"] <= 2 for metrics in run.metrics())
    run.leaves_nothing(within_s=5)


def test_a_fully_asynchronous_run_goes_on_across_updates_within_the_bound(start: Starter) -> None:
    run = start(
        *(*FULLY_ASYNC, "--num-rollout", "4", "--max-weight-staleness", "1", "--rollout-max-response-len", "48"),
        *("--eval-interval", "4", "--eval-prompt-data", "held", f"{start.prompts}@[:4]", "--check-weight-update-equal"),
    ).succeeds()
    for rollout_id in range(4):
        assert indices(run, rollout_id) == list(range(8 * rollout_id, 8 * rollout_id + 8))
        assert min(versions(run, rollout_id)) >= rollout_id - 1
        assert max(versions(run, rollout_id)) <= rollout_id
    assert 0 in versions(run, 1)
    assert all(metrics["rollout/staleness/max"] <= 1 for metrics in run.metrics())
    assert len(run.metrics("eval/step")) == 2
    run.leaves_nothing(within_s=5)


def test_a_fully_asynchronous_run_that_is_killed_resumes_with_what_was_under_way(start: Starter) -> None:
    flags = (*FULLY_ASYNC, "--num-rollout", "5", "--save", str(start.folder / "ckpt"), "--save-interval", "1")
    tracker = start.folder / "ckpt" / "latest_checkpointed_iteration.txt"
    first = start(*flags, command=TRAIN_ASYNC)
    wait_for(
        lambda: tracker.is_file() and int(tracker.read_text()) >= 1, timeout_s=120, what="the checkpoint of step 1"
    )
    first.process.send_signal(signal.SIGKILL)
    first.leaves_nothing()
    run = start(*flags, "--resume", command=TRAIN_ASYNC).succeeds()
    for rollout_id in range(5):
        assert indices(run, rollout_id) == list(range(8 * rollout_id, 8 * rollout_id + 8))
        assert min(versions(run, rollout_id)) >= rollout_id - 2
    run.leaves_nothing(within_s=5)


def test_an_engine_that_is_killed_under_groups_of_several_rollouts_costs_no_sample(start: Starter) -> None:
    run = start(*FULLY_ASYNC, "--num-rollout", "4", "--rollout-max-response-len", "48").reaches("record_000000.json")
    run.the_process(ENGINE).send_signal(signal.SIGKILL)
    run.succeeds()
    for rollout_id in range(4):
        assert indices(run, rollout_id) == list(range(8 * rollout_id, 8 * rollout_id + 8))
        assert min(versions(run, rollout_id)) >= rollout_id - 2
    assert [metrics["rollout/num_failed"] for metrics in run.metrics()] == [0, 0, 0, 0]
    run.leaves_nothing(within_s=5)


@pytest.mark.parametrize(("flags", "command"), [(APART, TRAIN_ASYNC), (FULLY_ASYNC, TRAIN)])
def test_a_rollout_ahead_that_fails_ends_the_run_though_training_goes_on(
    start: Starter, flags: tuple[str, ...], command: tuple[str, ...]
) -> None:
    run = start(
        *(*flags, "--custom-generate-function-path", "recorder.breaks_while_rollout_0_is_trained_on"),
        *("--rollout-data-postprocess-path", "recorder.trains_for_ever"),
        command=command,
    ).reaches("training_0")
    assert run.wait(120) == 1, run.output()
    assert "sample 8 is lost" in run.output()
    place = "in rollout manager, while the driver waited for training on rollout 0"
    assert place in (run.run_dir / "error.log").read_text()
    run.leaves_nothing()
