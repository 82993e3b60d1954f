"""Four ranks that share two things at once train as FSDP trains on one. All happens in one group of four processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import assert_equal_runs, save_run
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks

pytestmark = pytest.mark.slow

TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = {**TENSOR, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2}
CONTEXT = {"context_parallel_size": 2}
EXPERTS = {"expert_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = {**DISTRIBUTED, "overlap_grad_reduce": True}
EMPTY = {"megatron_args": {"microbatch_group_size_per_vp_stage": 5}}  # of 5 micro-batches one at least has no samples

# By the model that is trained; of `tied` the first and the last stage share a matrix.
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "tied": {
        "tensor_and_data": {**TENSOR, **DISTRIBUTED},
        "tensor_and_pipeline": {**TENSOR, **PIPELINE},
        "sequence_and_context": {**SEQUENCE, **CONTEXT},
        "pipeline_and_context": {**PIPELINE, **CONTEXT},
        "virtual_stages_and_sequence": {**VIRTUAL, **SEQUENCE},
        "virtual_stages_and_context": {**VIRTUAL, **CONTEXT},
        "virtual_stages_and_data": {**VIRTUAL, **OVERLAP},
    },
    "deep": {
        "uneven_pipeline": {
            "pipeline_model_parallel_size": 4,
            "decoder_first_pipeline_num_layers": 1,
            "decoder_last_pipeline_num_layers": 3,
        },
        "long_virtual_stages": {"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 1},
        "uneven_virtual_stages": {**VIRTUAL, **TENSOR, **EMPTY, "decoder_last_pipeline_num_layers": 2},
        "given_layout": {
            **PIPELINE,
            **DISTRIBUTED,
            "megatron_args": {"pipeline_model_parallel_layout": "Et|ttt|tt|tt|L|"},
        },
    },
    "moe": {
        "split_experts": {**SEQUENCE, **EXPERTS},
        "sequence_and_experts": {**SEQUENCE, **EXPERTS, **DISTRIBUTED, "expert_tensor_parallel_size": 1},
        "pipeline_and_experts": {**PIPELINE, **EXPERTS},
        "context_and_experts": {**CONTEXT, **EXPERTS},
        "virtual_stages_and_experts": {**VIRTUAL, **EXPERTS, **DISTRIBUTED, **EMPTY},
        "sequence_context_and_experts": {
            **SEQUENCE,
            **CONTEXT,
            "expert_model_parallel_size": 4,
            "expert_tensor_parallel_size": 1,
        },
    },
}


def four_ranks_body(work: Path) -> None:
    with megatron_on_cpu():
        for model, layouts in LAYOUTS.items():
            for layout, parallel in layouts.items():
                save_run(layout, work / model, work, parallel)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("runs")
    make_tiny_model(work / "tied", num_hidden_layers=4, vocab_size=321, tie_word_embeddings=True)
    make_tiny_model(work / "deep", "llama", num_hidden_layers=8)
    make_tiny_model(work / "moe", "qwen3_moe", num_hidden_layers=4)
    for model in LAYOUTS:
        save_run(f"fsdp_{model}", work / model, work, None)
    run_ranks(four_ranks_body, 4, work, store=work / "store")
    return work


@pytest.mark.parametrize(("model", "layout"), [(model, layout) for model in LAYOUTS for layout in LAYOUTS[model]])
def test_four_ranks_of_megatron_train_as_one_of_fsdp(model: str, layout: str, runs: Path) -> None:
    assert_equal_runs(runs / f"{layout}.pt", runs / f"fsdp_{model}.pt")
