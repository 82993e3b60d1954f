"""Faults in a run: what dies is restarted, or the job ends with one sentence and takes everything along."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from tests.e2e.cpu.helpers.runs import ENGINE, ROUTER, TRAINER, Run, Starter, wait_for

LONG = ("--rollout-max-response-len", "600", "--custom-generate-function-path", "recorder.generate")
ONE_ROLLOUT = ("--num-rollout", "1")
MANY_ROLLOUTS = ("--num-rollout", "1000")
WITHIN_S = 300.0  # of any end here, on a machine that does other things: what is shown is that nothing hangs


def _has_all_samples(run: Run) -> bool:
    samples = run.samples(0)
    versions = {version for sample in samples for version in sample["weight_versions"]}
    return [sample["index"] for sample in samples] == list(range(8)) and versions == {"0"}


def _fails(run: Run, *says: str) -> None:
    assert run.wait(WITHIN_S) == 1, run.output()
    message = run.output()[run.output().index("error: ") :]
    for part in says:
        assert part in message
    run.leaves_nothing()


def test_an_engine_killed_in_mid_rollout_is_restarted_and_no_sample_is_lost(start: Starter) -> None:
    run = start(*LONG, *ONE_ROLLOUT).reaches("in_flight/7")
    run.the_process(ENGINE).send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert _has_all_samples(run)
    assert (run.run_dir / "logs" / "engine_0_start_2.log").is_file()
    assert "ended with code 137: restarting it" in run.output()
    run.leaves_nothing()


@pytest.mark.slow
def test_an_engine_killed_where_weights_lie_in_no_file_gets_those_that_trainers_write_for_it(start: Starter) -> None:
    run = start(*LONG, *ONE_ROLLOUT, "--rollout-sample-hook-path", "no_files.hook").reaches("in_flight/7")
    run.the_process(ENGINE).send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert _has_all_samples(run)
    assert "writing weights v0 for an engine that is to be started" in run.output()
    run.leaves_nothing()


@pytest.mark.slow
def test_an_engine_killed_outside_of_a_rollout_is_replaced_when_its_turn_comes(start: Starter) -> None:
    run = start("--num-rollout", "4", "--num-steps-per-rollout", "8").reaches("record_000000.json")
    run.the_process(ENGINE).send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert [len(run.samples(rollout_id)) for rollout_id in range(4)] == [8, 8, 8, 8]
    for rollout_id in range(4):
        versions = {version for sample in run.samples(rollout_id) for version in sample["weight_versions"]}
        assert versions == {str(rollout_id)}
    assert (run.run_dir / "logs" / "engine_0_start_2.log").is_file()


@pytest.mark.slow
def test_an_engine_that_hangs_is_killed_and_restarted(start: Starter) -> None:
    run = start(*LONG, *ONE_ROLLOUT, "--rollout-health-check-timeout", "5").reaches("in_flight/7")
    engine = run.the_process(ENGINE)
    engine.send_signal(signal.SIGSTOP)
    run.succeeds(WITHIN_S)
    assert _has_all_samples(run)
    assert not engine.is_running()
    assert "does not answer /health: restarting it" in run.output()


@pytest.mark.slow
def test_an_engine_that_dies_again_while_it_restarts_is_restarted_again(start: Starter) -> None:
    run = start(*LONG, *ONE_ROLLOUT).reaches("in_flight/7")
    run.the_process(ENGINE).send_signal(signal.SIGKILL)
    run.reaches("logs/engine_0_start_2.log")
    wait_for(lambda: run.processes(ENGINE), timeout_s=30, what="the second start").pop().send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert _has_all_samples(run)
    assert "engine_0 did not come back: engine_0 ended with code 137" in run.output()
    assert (run.run_dir / "logs" / "engine_0_start_3.log").is_file()


@pytest.mark.slow
def test_an_engine_whose_owner_is_killed_gets_another_one(start: Starter) -> None:
    run = start(*LONG, *ONE_ROLLOUT).reaches("in_flight/7")
    run.the_process("ray::ProcessHost").send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert _has_all_samples(run)
    assert "the actor that owns engine_0 died" in run.output()
    run.leaves_nothing()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["disk", "distributed"])
def test_an_engine_that_hangs_in_a_weight_update_is_restarted_with_the_new_weights(
    start: Starter, transport: str
) -> None:
    run = start(
        *("--update-weight-transport", transport),
        *("--no-colocate", "--rollout-num-gpus", "1", "--num-steps-per-rollout", "8"),
        *("--rollout-health-check-interval", "600", "--weight-sync-timeout-s", "10"),
    ).reaches("record_000000.json")
    engine = run.the_process(ENGINE)
    engine.send_signal(signal.SIGSTOP)
    run.succeeds(WITHIN_S)
    assert not engine.is_running()
    assert {version for sample in run.samples(1) for version in sample["weight_versions"]} == {"1"}
    assert (run.run_dir / "logs" / "engine_0_start_2.log").is_file()
    run.leaves_nothing()


@pytest.mark.slow
def test_an_engine_killed_before_a_broadcast_is_left_out_of_it_and_restarted_with_the_new_weights(
    start: Starter,
) -> None:
    run = start(
        *("--no-colocate", "--rollout-num-gpus", "2", "--num-steps-per-rollout", "8", "--check-weight-update-equal"),
        *("--rollout-health-check-interval", "600", "--update-weight-transport", "distributed"),
    ).reaches("record_000000.json")
    run.processes(ENGINE)[0].send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert {version for sample in run.samples(1) for version in sample["weight_versions"]} == {"1"}
    assert len(list((run.run_dir / "logs").glob("engine_*_start_2.log"))) == 1
    assert "is lost on the way to weights v1" in run.output()
    assert "writing weights v1 for an engine that is to be started" in run.output()
    run.leaves_nothing()


@pytest.mark.slow
def test_a_router_killed_in_mid_rollout_is_restarted(start: Starter) -> None:
    run = start(*LONG, *ONE_ROLLOUT).reaches("in_flight/7")
    run.the_process(ROUTER).send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert _has_all_samples(run)
    assert "the router is back" in run.output()


@pytest.mark.slow
def test_engines_that_die_again_and_again_end_the_run(start: Starter) -> None:
    run = start(*LONG, *ONE_ROLLOUT, "--max-engine-restarts", "0").reaches("in_flight/7")
    run.the_process(ENGINE).send_signal(signal.SIGKILL)
    _fails(run, "engine_0 died", "--max-engine-restarts 0", "logs")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in_flight/7", "record_000000.json"])
def test_a_trainer_that_dies_is_named_and_ends_the_run(start: Starter, moment: str) -> None:
    slots = ("--actor-num-gpus-per-node", "2", "--rollout-batch-size", "4", "--num-steps-per-rollout", "8")
    run = start(*LONG, *slots, *MANY_ROLLOUTS).reaches(moment)
    trainer = run.processes(TRAINER)[1]
    trainer.send_signal(signal.SIGKILL)
    _fails(run, f"(pid {trainer.pid}) died", "trainer ", "--resume")


def test_kill_9_of_the_driver_leaves_no_process_and_no_weights(start: Starter) -> None:
    run = start(*LONG).reaches("in_flight/7")
    assert len(run.processes("ray::")) >= 4
    assert list(run.weights_root.iterdir())
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(5)
    run.leaves_nothing()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["logs/engine_0_start_1.log", "in_flight/7"])
def test_ctrl_c_ends_everything(start: Starter, moment: str) -> None:
    run = start(*LONG, *MANY_ROLLOUTS).reaches(moment)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    assert run.wait(WITHIN_S) == 130, run.output()
    assert run.output().rstrip().endswith("interrupted")
    assert "Traceback" not in run.output()
    run.leaves_nothing()


@pytest.mark.slow
def test_sigterm_saves_at_the_next_step_boundary_and_exits_0(start: Starter) -> None:
    save = start.folder / "ckpt"
    run = start(*MANY_ROLLOUTS, "--save", str(save)).reaches("record_000001.json")
    run.process.send_signal(signal.SIGTERM)
    run.succeeds(WITHIN_S)
    step = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert step >= 1
    assert len(run.metrics()) == step + 1
    assert (save / "rollout" / f"global_dataset_state_dict_{step}.pt").is_file()
    run.leaves_nothing()


@pytest.mark.slow
def test_sigterm_in_an_evaluation_saves_the_step_before_it_and_begins_no_other(start: Starter) -> None:
    save = start.folder / "ckpt"
    run = start(
        *(*MANY_ROLLOUTS, "--save", str(save), "--skip-eval-before-train", "--eval-interval", "1"),
        *("--eval-prompt-data", "held", str(start.prompts), "--eval-max-response-len", "300"),
    ).reaches("evaluation_000001")
    run.process.send_signal(signal.SIGTERM)
    run.succeeds(WITHIN_S)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert len(run.metrics()) == 1
    assert not (run.run_dir / "record_000001.json").exists()
    run.leaves_nothing()


@pytest.mark.slow
def test_sigterm_during_the_start_ends_everything(start: Starter) -> None:
    run = start().reaches("logs/engine_0_start_1.log")
    run.process.send_signal(signal.SIGTERM)
    run.succeeds(WITHIN_S)
    assert "SIGTERM before the first rollout" in run.output()
    run.leaves_nothing()


@pytest.mark.slow
def test_a_step_that_outlasts_the_grace_period_ends_the_run(start: Starter) -> None:
    run = start(*LONG, *MANY_ROLLOUTS, "--shutdown-grace-s", "0.1").reaches("in_flight/7")
    run.process.send_signal(signal.SIGTERM)
    _fails(run, "--shutdown-grace-s")


@pytest.mark.slow
def test_an_engine_that_refuses_its_settings_ends_the_run_with_its_log(start: Starter) -> None:
    run = start("--sglang-max-total-tokens", "1")
    _fails(run, "engine_0 ended with code", "Its log ends:", "key-value cache", "--mem-fraction-static")


@pytest.mark.slow
def test_an_engine_that_does_not_come_up_in_time_ends_the_run(start: Starter) -> None:
    run = start("--engine-start-timeout-s", "1")
    _fails(run, "did not answer within 1 s", "Its log ends:")


@pytest.mark.slow
def test_a_port_in_use_is_named(start: Starter) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = start("--router-prometheus-port", str(taken.getsockname()[1]))
        _fails(run, "the router at", "ddress already in use")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_skips_steps_dumps_samples_and_stops(start: Starter) -> None:
    lost = ("--custom-generate-function-path", "recorder.without_log_probs", "--use-rollout-logprobs")
    run = start(*MANY_ROLLOUTS, *lost, "--max-skipped-steps", "1")
    _fails(run, "2 optimizer steps", "--max-skipped-steps 1", "skipped_steps")
    assert [m["train/skipped_steps"] for m in run.metrics("train/step")] == [1.0]
    dumps = sorted((run.run_dir / "skipped_steps").iterdir())
    assert [len(dump.read_text().splitlines()) for dump in dumps] == [8, 8]


@pytest.mark.slow
def test_rewards_that_a_post_processing_makes_infinite_are_named(start: Starter) -> None:
    run = start("--custom-reward-post-process-path", "recorder.infinite_rewards")
    _fails(run, "sample 0", "--custom-reward-post-process-path", "inf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("raises", ("recorder.raises", "sample ", "no such answer")),
        ("returns_nan", ("recorder.returns_nan", "sample ", "nan")),
        ("hangs", ("recorder.hangs", "sample ", "no reward within 1 s (--rm-timeout-s)")),
    ],
)
def test_a_reward_plug_in_that_fails_is_named(start: Starter, reward: str, says: tuple[str, ...]) -> None:
    run = start("--custom-rm-path", f"recorder.{reward}", "--rm-timeout-s", "1")
    _fails(run, "samples failed", "--max-failed-fraction", *says)
