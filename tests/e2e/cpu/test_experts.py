"""A mixture of experts from end to end: engine, weights, training."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.e2e.cpu.helpers.runs import Starter
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow


def test_a_mixture_of_experts_learns_and_its_engine_follows(start: Starter) -> None:
    model = make_tiny_model(start.folder / "moe", "qwen3_moe")
    exports = start.folder / "hf_{rollout_id}"
    run = start(
        *("--hf-checkpoint", str(model), "--num-rollout", "3", "--check-weight-update-equal"),
        *("--use-pytorch-profiler", "--profile-step-start", "1", "--profile-step-end", "2"),
        *("--save", str(start.folder / "ckpt"), "--save-hf", str(exports), "--async-save"),
    ).succeeds()
    before = load_file(model / "model.safetensors")
    after = load_file(start.folder / "hf_2" / "model-00001.safetensors")
    assert after.keys() == before.keys()
    assert any(not after[name].equal(before[name]) for name in before if ".experts." in name)
    gaps = [metrics["train/train_rollout_logprob_abs_diff"] for metrics in run.metrics("train/step")]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4  # engine and trainer mean the same model, also after updates
    assert [path.name for path in (run.run_dir / "profile").iterdir()] == ["train_000001_rank_0000.json.gz"]
    run.leaves_nothing()
