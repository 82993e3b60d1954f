"""Two trainer ranks and two engines with slots of their own."""

from __future__ import annotations

import pytest

from tests.e2e.cpu.helpers.runs import ENGINE, Starter


@pytest.mark.slow
def test_a_disaggregated_run_with_two_trainers_and_two_engines(start: Starter) -> None:
    run = start(
        *("--no-colocate", "--actor-num-gpus-per-node", "2", "--rollout-num-gpus", "2"),
        *("--num-steps-per-rollout", "2", "--use-kl-loss", "--kl-loss-coef", "0.01", "--check-weight-update-equal"),
    ).reaches("record_000000.json")
    assert len(run.processes(ENGINE)) == 2
    run.succeeds()
    assert {v for sample in run.samples(1) for v in sample["weight_versions"]} == {"1"}
    assert all(m["train/kl_loss"] >= 0 and m["train/grad_norm"] > 0 for m in run.metrics("train/step"))
    run.leaves_nothing(within_s=5)
