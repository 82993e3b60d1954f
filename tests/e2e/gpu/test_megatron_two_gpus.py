"""The Megatron backend on two GPUs over NCCL trains as FSDP on one, whatever the two share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_training import assert_equal_runs, save_run
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks

pytest.importorskip("megatron.core")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, found {torch.cuda.device_count()}"),
]

PIPELINE = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "overlap": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "context": {"context_parallel_size": 2},
    "pipeline": PIPELINE,
    "virtual_stages": {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2},
}


def train(layouts: dict[str, dict[str, Any] | None], folder: Path) -> None:
    for layout, parallel in layouts.items():
        save_run(layout, folder / "model", folder, parallel, device="cuda")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one GPU found with FSDP, and what two did with Megatron."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny_model(folder / "model", num_hidden_layers=4, vocab_size=321)
    run_ranks(train, 1, {"fsdp": None}, folder, store=folder / "store_1", device="cuda", cpu_backend="gloo")
    run_ranks(train, 2, LAYOUTS, folder, store=folder / "store_2", device="cuda", cpu_backend="gloo")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_of_megatron_train_as_one_of_fsdp(layout: str, runs: Path) -> None:
    assert_equal_runs(runs / f"{layout}.pt", runs / "fsdp.pt", tolerance=1e-4)
