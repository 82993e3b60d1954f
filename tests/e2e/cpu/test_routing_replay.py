"""A mixture of experts that is trained with the experts its engine sampled with, behind a real router."""

from __future__ import annotations

import pytest

from tests.e2e.cpu.helpers.runs import Starter
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow


def test_the_gap_to_the_engine_is_not_larger_with_its_experts(start: Starter) -> None:
    model = make_tiny_model(start.folder / "moe", "qwen3_moe")
    flags = ("--hf-checkpoint", str(model), "--num-rollout", "3", "--num-steps-per-rollout", "2", "--lr", "1e-2")
    plain = start(*flags, name="plain").succeeds()
    replayed = start(*flags, "--use-rollout-routing-replay", name="replayed").succeeds()
    gaps = []
    for run in (plain, replayed):
        steps = run.metrics("train/step")
        assert len(steps) == 3
        gaps.append(max(metrics["train/train_rollout_logprob_abs_diff"] for metrics in steps))
    assert gaps[1] <= gaps[0] + 1e-6
    shares = [metrics["train/routing_replay_mismatch"] for metrics in replayed.metrics("train/step")]
    assert 0 < max(shares) < 0.5, "the second step's router has moved"
    assert all("train/routing_replay_mismatch" not in metrics for metrics in plain.metrics("train/step"))
    replayed.leaves_nothing()


def test_experts_of_two_engines_and_of_responses_in_pieces_reach_two_stages_of_megatron(start: Starter) -> None:
    model = make_tiny_model(start.folder / "moe", "qwen3_moe")
    run = start(
        *("--hf-checkpoint", str(model), "--use-rollout-routing-replay", "--num-rollout", "3", "--partial-rollout"),
        *("--over-sampling-batch-size", "4", "--num-steps-per-rollout", "2", "--rollout-max-response-len", "64"),
        *("--train-backend", "megatron", "--custom-megatron-init-path", "megatron_here.init"),
        *("--actor-num-gpus-per-node", "2", "--pipeline-model-parallel-size", "2"),
    ).succeeds()
    steps = run.metrics("train/step")
    assert len(steps) == 3
    assert max(metrics["train/train_rollout_logprob_abs_diff"] for metrics in steps[:1]) < 1e-4
    samples = [sample for number in range(3) for sample in run.samples(number)]
    assert all(sample["rollout_routed_experts"]["shape"] == [len(sample["tokens"]) - 1, 2, 2] for sample in samples)


def test_a_dense_model_is_refused_at_once(start: Starter) -> None:
    run = start("--use-rollout-routing-replay")
    assert run.wait() != 0
    assert "--use-rollout-routing-replay: " in run.output() and "the model is dense. Drop it." in run.output()
