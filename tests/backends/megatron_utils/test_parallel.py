"""Two ranks, whatever they share, train as FSDP trains on one. All happens in one pair of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import STEADY, Run, make_megatron, two_critic_rollouts, two_rollouts
from helpers.tiny_models import make_tiny_model
from helpers.training import make_backend, run_ranks, settings_for

from slime.backends.fsdp_utils.backend import FSDPBackend

pytestmark = pytest.mark.slow

DYNAMIC = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 40, "num_steps_per_rollout": 2}
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


def run_one(layout: str, parallel: dict[str, Any], model: Path, work: Path) -> None:
    args = settings_for(model, **STEADY | DYNAMIC)
    backend = make_megatron(args, **parallel)
    backend.load()
    run = two_rollouts(backend, args, work)
    if dist.get_rank() == 0:
        torch.save(tuple(run), work / f"{layout}.pt")


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
            run_one(layout, parallel, model, work)
        for layout, parallel in MOE_LAYOUTS.items():
            run_one(layout, parallel, moe, work)
        for layout in CRITICS:
            run_critic(layout, model, work)


def run_fsdp(name: str, model: Path, work: Path) -> None:
    args = settings_for(model, **STEADY | DYNAMIC)
    fsdp = make_backend(args)
    fsdp.load()
    torch.save(tuple(two_rollouts(fsdp, args, work)), work / f"{name}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("runs")
    model = make_tiny_model(work / "model", num_hidden_layers=4, vocab_size=321)  # two ranks pad the vocabulary
    moe = make_tiny_model(work / "moe", "qwen3_moe")
    run_fsdp("fsdp", model, work)
    run_fsdp("fsdp_moe", moe, work)
    args = settings_for(model, advantage_estimator="ppo", **STEADY | DYNAMIC)
    critic = FSDPBackend(args, args, torch.device("cpu"), role="critic")
    critic.load()
    torch.save(two_critic_rollouts(critic, args), work / "critic_fsdp.pt")
    run_ranks(two_ranks_body, 2, model, moe, work, store=work / "store")
    return work


@pytest.mark.parametrize("layout", [*LAYOUTS, *MOE_LAYOUTS])
def test_two_ranks_of_megatron_train_as_one_of_fsdp(layout: str, runs: Path) -> None:
    reference = "fsdp_moe" if layout in MOE_LAYOUTS else "fsdp"
    theirs, ours = (Run(*torch.load(runs / f"{name}.pt")) for name in (reference, layout))
    for expected, metrics in zip(theirs.metrics, ours.metrics, strict=True):
        assert metrics == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert ours.weights.keys() == theirs.weights.keys()
    for name, tensor in ours.weights.items():
        torch.testing.assert_close(tensor, theirs.weights[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", CRITICS)
def test_a_critic_of_two_ranks_learns_as_one_of_fsdp(layout: str, runs: Path) -> None:
    metrics, values = torch.load(runs / f"critic_{layout}.pt")
    expected, expected_values = torch.load(runs / "critic_fsdp.pt")
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    assert expected_values[1].abs().max() > 1e-3
    torch.testing.assert_close(values, expected_values, rtol=0, atol=1e-5)
