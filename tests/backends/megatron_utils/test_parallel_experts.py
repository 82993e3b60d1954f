"""DeepSeek-V3 and GLM-4.5 on two ranks, whatever they share, train as FSDP trains them on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import DYNAMIC, STEADY, Run, assert_equal_runs, make_megatron, save_run, two_rollouts
from helpers.model_families import write_tiny_model
from helpers.training import full_weights, run_ranks, settings_for

pytestmark = pytest.mark.slow

SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sequence": SEQUENCE,
    "pipeline": {"pipeline_model_parallel_size": 2},
    "virtual_stages": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    "context": {"context_parallel_size": 2},
    "experts": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
    "sequence_and_experts": {**SEQUENCE, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", {}),
    "without_query_rank": ("deepseek_v3", {"q_lora_rank": None}),
    "glm4_moe": ("glm4_moe", {}),
}
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS]


def two_ranks_body(work: Path) -> None:
    with megatron_on_cpu():
        for model, layout in CASES:
            args = settings_for(work / model, save=str(work / f"{model}_{layout}"), **STEADY | DYNAMIC)
            backend = make_megatron(args, **LAYOUTS[layout])
            backend.load()
            run = two_rollouts(backend, args, work)
            backend.save(1)
            if dist.get_rank() == 0:
                torch.save(tuple(run), work / f"{model}_{layout}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("runs")
    for model, (family, fields) in MODELS.items():
        write_tiny_model(family, work / model, vocab_size=320, initializer_range=0.2, **fields)
        save_run(f"{model}_fsdp", work / model, work, None)
    run_ranks(two_ranks_body, 2, work, store=work / "store")
    return work


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_two_ranks_of_megatron_train_as_one_of_fsdp(model: str, layout: str, runs: Path) -> None:
    assert_equal_runs(runs / f"{model}_{layout}.pt", runs / f"{model}_fsdp.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_reads_what_two_saved(layout: str, runs: Path) -> None:
    args = settings_for(runs / "deepseek_v3", load=str(runs / f"deepseek_v3_{layout}"), no_load_optim=True)
    backend = make_megatron(args)
    assert backend.load() == 2
    saved = Run(*torch.load(runs / f"deepseek_v3_{layout}.pt")).weights
    assert all(torch.equal(tensor, saved[name]) for name, tensor in full_weights(backend).items())  # type: ignore[arg-type]
