"""Routing replay on one GPU: experts that SGLang sampled with, followed by both trainers in bfloat16."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.e2e.cpu.helpers.runs import Run, Starter
from tests.helpers.tiny_models import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WITHIN_S = 500.0
BACKENDS = {
    "fsdp": (),
    "megatron": ("--train-backend", "megatron", "--recompute-granularity", "full", "--recompute-method", "uniform")
    + ("--recompute-num-layers", "1"),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 32 experts, whose scores are close: kernels that differ send some tokens elsewhere."""
    shape = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 32}
    options = {"num_experts_per_tok": 4, "num_hidden_layers": 4, "initializer_range": 0.05}
    return make_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", dtype="bfloat16", **shape, **options)


def mean_gap(run: Run) -> float:
    gaps = [metrics["train/train_rollout_logprob_abs_diff"] for metrics in run.metrics("train/step")]
    assert len(gaps) == 3
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gap_to_sglang_is_smaller_with_its_experts(start: Starter, moe: Path, backend: str) -> None:
    if backend == "megatron" and importlib.util.find_spec("megatron") is None:
        pytest.skip("needs Megatron-core")
    flags = ("--hf-checkpoint", str(moe), "--num-rollout", "3", "--num-steps-per-rollout", "2", "--colocate")
    flags += BACKENDS[backend]
    plain = start(*flags, name="plain").succeeds(WITHIN_S)
    replayed = start(*flags, "--use-rollout-routing-replay", name="replayed").succeeds(WITHIN_S)
    shares = [metrics["train/routing_replay_mismatch"] for metrics in replayed.metrics("train/step")]
    print(
        f"{backend}: gap {mean_gap(plain):.5f}, with the engine's experts {mean_gap(replayed):.5f}; mismatch {shares}"
    )
    assert all(0 < share < 0.5 for share in shares)
    assert mean_gap(replayed) <= 1.1 * mean_gap(plain)
    replayed.leaves_nothing()
