"""What Megatron's configurations are made from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_families import CONFIGS
from helpers.tiny_models import make_tiny_model
from transformers import AutoConfig

from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.megatron_utils.names import read_shape, shape_of
from slime.config.base import ConfigError


def test_experts_want_sequence_parallel_beside_tensor_parallel(tmp_path: Path) -> None:
    from slime.backends.megatron_utils.transformer import transformer_config

    cfg = MegatronConfig(tensor_model_parallel_size=2)
    shape = read_shape(make_tiny_model(tmp_path, "qwen3_moe"))
    with pytest.raises(ConfigError, match="need --sequence-parallel"):
        transformer_config(
            shape, cfg, context_size=1, dtype=torch.float32, device=torch.device("cpu"), transformer_engine=False
        )


def test_queries_without_a_low_rank_are_left_to_layers_on_torch() -> None:
    from slime.backends.megatron_utils.transformer import transformer_config

    shape = shape_of(AutoConfig.for_model(**CONFIGS["deepseek_v3"] | {"q_lora_rank": None}))
    options: dict[str, Any] = {"context_size": 1, "dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(ConfigError, match="without q_lora_rank needs --transformer-impl local"):
        transformer_config(shape, MegatronConfig(), transformer_engine=True, **options)
    assert transformer_config(shape, MegatronConfig(), transformer_engine=False, **options).q_lora_rank is None


def test_weights_are_gathered_when_a_step_ends(caplog: pytest.LogCaptureFixture) -> None:
    from slime.backends.megatron_utils.transformer import ddp_config, warn_of_settings_without_effect

    cfg = MegatronConfig(use_distributed_optimizer=True, megatron_args={"overlap_param_gather": True})
    assert not ddp_config(cfg).overlap_param_gather
    with caplog.at_level(logging.WARNING):
        warn_of_settings_without_effect(cfg)
    assert "overlap_param_gather has no effect" in caplog.text
