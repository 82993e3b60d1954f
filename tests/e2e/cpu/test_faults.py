"""Faults while a run is under way: what dies is restarted, or the job ends and takes everything with it."""

from __future__ import annotations

import signal

from tests.e2e.cpu.helpers.runs import ENGINE, Run, Starter

LONG = ("--rollout-max-response-len", "600", "--custom-generate-function-path", "recorder.generate")
ONE_ROLLOUT = ("--num-rollout", "1")


def test_an_engine_killed_in_mid_rollout_is_restarted_and_no_sample_is_lost(start: Starter) -> None:
    run = start(*LONG, *ONE_ROLLOUT).reaches("in_flight/7")
    run.the_process(ENGINE).send_signal(signal.SIGKILL)
    run.succeeds()
    assert [sample["index"] for sample in run.samples(0)] == list(range(8))
    assert {version for sample in run.samples(0) for version in sample["weight_versions"]} == {"0"}
    assert (run.run_dir / "logs" / "engine_0_start_2.log").is_file()
    assert "ended with code 137: restarting it" in run.output()
    run.leaves_nothing(within_s=5)


def test_kill_9_of_the_driver_leaves_no_process_and_no_weights(start: Starter) -> None:
    run = start(*LONG).reaches("in_flight/7")
    assert len(run.processes()) > 5
    assert list(run.weights_root.iterdir())
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(5)
    run.leaves_nothing(within_s=30)
