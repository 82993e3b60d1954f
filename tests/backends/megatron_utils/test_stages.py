"""How the settings share layers among pipeline ranks and virtual stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slime.arguments import parse_args
from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.megatron_utils.stages import micro_batch_group, num_virtual_stages
from slime.config.base import ConfigError


@pytest.mark.parametrize(
    ("num_layers", "settings", "expected"),
    [
        (8, {"pipeline_model_parallel_size": 2}, 1),
        (8, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}, 2),
        (8, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, 4),
        (8, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 4}, 1),
        (7, {"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 1}, 1),
        (7, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 3}, 1),
        (
            8,
            {
                "pipeline_model_parallel_size": 2,
                "decoder_first_pipeline_num_layers": 2,
                "decoder_last_pipeline_num_layers": 6,
                "num_virtual_stages_per_pipeline_rank": 2,
            },
            2,
        ),
        (7, {"pipeline_model_parallel_size": 2, "megatron_args": {"account_for_loss_in_pipeline_split": True}}, 1),
        (4, {"pipeline_model_parallel_size": 2, "megatron_args": {"pipeline_model_parallel_layout": "Et|t|t|tL"}}, 2),
    ],
)
def test_virtual_stages_are_counted(num_layers: int, settings: dict[str, Any], expected: int) -> None:
    assert num_virtual_stages(MegatronConfig(**settings), num_layers) == expected


@pytest.mark.parametrize(
    ("num_layers", "settings", "message"),
    [
        (7, {"pipeline_model_parallel_size": 2}, "7 layers cannot be shared among --pipeline-model-parallel-size 2: 7"),
        (2, {"pipeline_model_parallel_size": 4}, "2 are left for 4 ranks"),
        (
            8,
            {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 1},
            "num-layers 1: 7 are left for 3 ranks",
        ),
        (
            8,
            {
                "pipeline_model_parallel_size": 2,
                "decoder_first_pipeline_num_layers": 1,
                "decoder_last_pipeline_num_layers": 6,
            },
            "1 are left for 0 ranks",
        ),
        (8, {"num_virtual_stages_per_pipeline_rank": 2}, "need --pipeline-model-parallel-size above 1"),
        (
            8,
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3},
            "3 must divide the layers of each pipeline rank: they have .4, 4.",
        ),
        (
            8,
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
            "3 must divide the 4 layers",
        ),
        (
            8,
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 2,
                "decoder_first_pipeline_num_layers": 4,
            },
            "give --num-virtual-stages-per-pipeline-rank",
        ),
        (
            8,
            {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "megatron_args": {"overlap_p2p_comm": False},
            },
            "overlap_p2p_comm cannot be set",
        ),
        (
            8,
            {"megatron_args": {"virtual_pipeline_model_parallel_size": 2}},
            "give --num-virtual-stages-per-pipeline-rank",
        ),
        (
            4,
            {"pipeline_model_parallel_size": 2, "megatron_args": {"pipeline_model_parallel_layout": "Et|t|ttL"}},
            "--pipeline-model-parallel-layout: .*divisible",
        ),
    ],
)
def test_layers_that_cannot_be_shared_so_are_refused(num_layers: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        num_virtual_stages(MegatronConfig(**settings), num_layers)


def test_virtual_stages_want_whole_groups_of_micro_batches() -> None:
    cfg = MegatronConfig(pipeline_model_parallel_size=4)
    assert micro_batch_group(cfg, 1) == 1
    assert micro_batch_group(cfg, 2) == 4
    wider = MegatronConfig(pipeline_model_parallel_size=4, megatron_args={"microbatch_group_size_per_vp_stage": 6})
    assert micro_batch_group(wider, 2) == 6


def test_a_run_is_refused_at_its_start(model: Path) -> None:
    flags = "--train-backend megatron --device cpu --custom-megatron-init-path a.b --prompt-data unread --num-rollout 1"
    flags += f" --hf-checkpoint {model} --actor-num-gpus-per-node 4 --pipeline-model-parallel-size 4 --colocate"
    with pytest.raises(ConfigError, match="2 layers cannot be shared among --pipeline-model-parallel-size 4"):
        parse_args([*flags.split(), "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"])
