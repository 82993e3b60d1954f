"""GRPO with Megatron in the trainers and SGLang in the engines, in bfloat16: on one GPU, and on two in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.cpu.helpers.runs import Run, Starter
from tests.helpers.tiny_models import make_tiny_model

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
requires_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="requires two GPUs")

WITHIN_S = 500.0
BF16_FLOOR = 2e-2  # of the mean difference between two log-probs of a token
EXPERTS_FLOOR = 5e-2  # rounding sends a token to another expert now and then
SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.02, "dtype": "bfloat16"}
MEGATRON = (
    *("--train-backend", "megatron", "--lr", "1e-4", "--entropy-coef", "0.01", "--num-rollout", "3"),
    "--check-weight-update-equal",
)
LAYOUTS = {
    "TP2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "CP2": ("--context-parallel-size", "2"),
    "DP2": ("--use-distributed-optimizer", "--overlap-grad-reduce"),
}


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 in bfloat16, which SGLang then computes in too."""
    return make_tiny_model(tmp_path_factory.mktemp("half"), "qwen3", **SHAPE)


def check(run: Run, floor: float = BF16_FLOOR) -> None:
    """Wait for the end of a run whose engines sampled each rollout with the weights that its trainers then moved."""
    run.succeeds(WITHIN_S)
    steps = run.metrics("train/step")
    assert len(steps) == 3
    for rollout_id, metrics in enumerate(steps):
        assert metrics["train/train_rollout_logprob_abs_diff"] < floor
        assert metrics["train/grad_norm"] > 0
        assert metrics["train/skipped_steps"] == 0
        assert {version for sample in run.samples(rollout_id) for version in sample["weight_versions"]} == {
            str(rollout_id)
        }
    run.leaves_nothing()


@pytest.mark.parametrize("compiled", ["--torch-compile", "--no-torch-compile"])
def test_trainer_and_engine_share_one_gpu(start: Starter, half: Path, compiled: str) -> None:
    check(start(*MEGATRON, "--hf-checkpoint", str(half), compiled))


@requires_two_gpus
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_share_two_gpus_with_two_engines(start: Starter, half: Path, layout: str) -> None:
    check(start(*MEGATRON, "--hf-checkpoint", str(half), "--actor-num-gpus-per-node", "2", *LAYOUTS[layout]))


@requires_two_gpus
def test_two_ranks_share_the_experts(start: Starter, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "experts", "qwen3_moe", moe_intermediate_size=128, **SHAPE)
    flags = ("--actor-num-gpus-per-node", "2", "--expert-model-parallel-size", "2")
    check(start(*MEGATRON, "--hf-checkpoint", str(model), *flags), EXPERTS_FLOOR)


@requires_two_gpus
def test_the_engine_is_on_another_gpu_than_the_trainer(start: Starter, half: Path) -> None:
    apart = ("--no-colocate", "--rollout-num-gpus", "1", "--update-weight-transport", "distributed")
    check(start(*MEGATRON, "--hf-checkpoint", str(half), *apart))
