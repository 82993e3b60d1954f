"""Two ranks, whatever they share, train as FSDP trains on one. All happens in one pair of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import (
    DYNAMIC,
    STEADY,
    assert_equal_runs,
    make_megatron,
    save_run,
    two_critic_rollouts,
)
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks, settings_for

from slime.backends.fsdp_utils.backend import FSDPBackend

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "distributed_optimizer": {"use_distributed_optimizer": True},
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "overlap": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "uneven_pipeline": {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
    "virtual_stages": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    "context": {"context_parallel_size": 2},
}


MOE_LAYOUTS: dict[str, dict[str, Any]] = {
    "experts": {"expert_model_parallel_size": 2},
    "sequence_and_experts": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
}


CRITICS = ("sequence", "pipeline", "virtual_stages", "context")


def run_critic(layout: str, model: Path, work: Path) -> None:
    args = settings_for(model, advantage_estimator="ppo", **STEADY | DYNAMIC)
    backend = make_megatron(args, role="critic", **LAYOUTS[layout])
    backend.load()
    run = two_critic_rollouts(backend, args)
    if dist.get_rank() == 0:
        torch.save(run, work / f"critic_{layout}.pt")


def two_ranks_body(model: Path, moe: Path, work: Path) -> None:
    with megatron_on_cpu():
        for layout, parallel in LAYOUTS.items():
            save_run(layout, model, work, parallel)
        for layout, parallel in MOE_LAYOUTS.items():
            save_run(layout, moe, work, parallel)
        for layout in CRITICS:
            run_critic(layout, model, work)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("runs")
    model = make_tiny_model(work / "model", num_hidden_layers=4, vocab_size=321)  # two ranks pad the vocabulary
    moe = make_tiny_model(work / "moe", "qwen3_moe")
    save_run("fsdp", model, work, None)
    save_run("fsdp_moe", moe, work, None)
    args = settings_for(model, advantage_estimator="ppo", **STEADY | DYNAMIC)
    critic = FSDPBackend(args, args, torch.device("cpu"), role="critic")
    critic.load()
    torch.save(two_critic_rollouts(critic, args), work / "critic_fsdp.pt")
    run_ranks(two_ranks_body, 2, model, moe, work, store=work / "store")
    return work


@pytest.mark.parametrize("layout", [*LAYOUTS, *MOE_LAYOUTS])
def test_two_ranks_of_megatron_train_as_one_of_fsdp(layout: str, runs: Path) -> None:
    reference = "fsdp_moe" if layout in MOE_LAYOUTS else "fsdp"
    assert_equal_runs(runs / f"{layout}.pt", runs / f"{reference}.pt")


@pytest.mark.parametrize("layout", CRITICS)
def test_a_critic_of_two_ranks_learns_as_one_of_fsdp(layout: str, runs: Path) -> None:
    metrics, values = torch.load(runs / f"critic_{layout}.pt")
    expected, expected_values = torch.load(runs / "critic_fsdp.pt")
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    assert expected_values[1].abs().max() > 1e-3
    torch.testing.assert_close(values, expected_values, rtol=0, atol=1e-5)
