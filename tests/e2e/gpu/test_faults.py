"""Faults of a run on a GPU whose weights travel through its memory: what dies is replaced, or the job ends."""

from __future__ import annotations

import signal

import pytest
import torch

from tests.e2e.cpu.helpers.runs import TRAINER, Run, Starter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SERVER = "sglang.launch_server"
# A rollout takes seconds: what is to die in its middle is found and killed in less.
LONG = (
    *("--rollout-max-response-len", "1800", "--max-tokens-per-gpu", "4096"),
    *("--custom-generate-function-path", "recorder.to_the_end"),
)
WITHIN_S = 400.0


def has_all_samples(run: Run, rollout_id: int) -> bool:
    """Whether the rollout has each sample once, of its own weight version."""
    samples = run.samples(rollout_id)
    versions = {version for sample in samples for version in sample["weight_versions"]}
    first = 8 * rollout_id
    return [sample["index"] for sample in samples] == list(range(first, first + 8)) and versions == {str(rollout_id)}


def test_an_engine_killed_in_mid_rollout_gets_the_weights_of_a_sleeping_trainer(start: Starter) -> None:
    run = start(*LONG, "--num-rollout", "2").reaches("record_000000.json", WITHIN_S)
    run.reaches("in_flight/15", WITHIN_S)
    run.the_process(SERVER).send_signal(signal.SIGKILL)
    run.succeeds(WITHIN_S)
    assert has_all_samples(run, 0)
    assert has_all_samples(run, 1)
    assert "writing weights v1 for an engine that is to be started" in run.output()
    run.leaves_nothing()


@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
def test_a_trainer_that_dies_is_named_and_the_run_goes_on_from_its_checkpoint(start: Starter, backend: str) -> None:
    if backend == "megatron":
        pytest.importorskip("megatron.core")
    save = ("--train-backend", backend, "--save", "checkpoints", "--save-interval", "1")
    run = start(*LONG, *save, "--num-rollout", "1000").reaches("record_000001.json", WITHIN_S)
    run.reaches("in_flight/*", WITHIN_S)
    trainer = run.the_process(TRAINER)
    trainer.send_signal(signal.SIGKILL)
    assert run.wait(WITHIN_S) == 1, run.output()
    message = run.output()[run.output().index("error: ") :]
    assert f"(pid {trainer.pid}) died" in message
    assert "--resume" in message
    run.leaves_nothing()
    done = len(run.metrics())
    again = start(*LONG, *save, "--num-rollout", str(done + 1), "--resume", name="again")
    again.succeeds(WITHIN_S)
    assert len(again.metrics()) >= 1
