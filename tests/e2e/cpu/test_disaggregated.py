"""Two trainer ranks, which share samples or their tokens, and engines with slots of their own."""

from __future__ import annotations

import pytest

from tests.e2e.cpu.helpers.runs import ENGINE, ROOT, Starter


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["disk", "distributed"])
def test_a_disaggregated_run_with_two_trainers_and_two_engines(start: Starter, transport: str) -> None:
    run = start(
        *("--no-colocate", "--actor-num-gpus-per-node", "2", "--rollout-num-gpus", "2"),
        *("--update-weight-transport", transport),
        *("--num-steps-per-rollout", "2", "--use-kl-loss", "--kl-loss-coef", "0.01", "--check-weight-update-equal"),
    ).reaches("record_000000.json")
    assert len(run.processes(ENGINE)) == 2
    run.succeeds()
    assert {v for sample in run.samples(1) for v in sample["weight_versions"]} == {"1"}
    assert all(m["train/kl_loss"] >= 0 and m["train/grad_norm"] > 0 for m in run.metrics("train/step"))
    run.leaves_nothing(within_s=5)


@pytest.mark.slow
def test_two_trainers_that_share_the_tokens_of_every_sample(start: Starter) -> None:
    save = start.folder / "ckpt"
    run = start(
        *("--no-colocate", "--actor-num-gpus-per-node", "2", "--rollout-num-gpus", "1", "--context-parallel-size", "2"),
        *("--global-batch-size", "1", "--max-tokens-per-gpu", "16", "--check-weight-update-equal"),
        *("--use-kl-loss", "--kl-loss-coef", "0.01"),
        *("--save", str(save), "--save-hf", str(save / "hf_{rollout_id}")),
        command=(str(ROOT / "train.py"),),
    ).succeeds()
    for metrics in run.metrics("train/step"):
        assert metrics["train/train_rollout_logprob_abs_diff"] < 1e-4
        assert metrics["train/grad_norm"] > 0
    assert all(metrics["perf/actor_train_tok_per_s"] > 0 for metrics in run.metrics())
    assert {v for sample in run.samples(1) for v in sample["weight_versions"]} == {"1"}
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert (save / "hf_1" / "config.json").is_file()
    run.leaves_nothing(within_s=5)
