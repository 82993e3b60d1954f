"""Operations counted against torch's own counter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from slime.observability.flops import training_flops
from tests.helpers.tiny_models import tiny_config


def _counted(architecture: str, length: int, **overrides: Any) -> tuple[float, dict[str, Any]]:
    """What torch counts of one forward and backward of eager attention over a sample, logits of all tokens."""
    config = AutoConfig.for_model(architecture, **tiny_config(architecture, **overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.arange(length)[None] % 7).logits.sum().backward()
    return float(counter.get_total_flops()), config.to_dict()


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
def test_a_dense_model_costs_what_torch_counts(architecture: str) -> None:
    """Eager attention computes the whole square of scores, the formula half of it and the diagonal."""
    length = 48
    counted, config = _counted(architecture, length)
    ours = training_flops(config, np.array([length]), np.array([length]))
    assert ours is not None
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    unseen = 3 * 2 * layers * 2 * width * (length * (length - 1) / 2)
    assert ours + unseen == pytest.approx(counted, rel=0.01)


def test_samples_add_up_and_logits_are_of_responses() -> None:
    config = tiny_config("qwen3")
    one = training_flops(config, np.array([30]), np.array([10]))
    two = training_flops(config, np.array([30, 30]), np.array([10, 10]))
    longer = training_flops(config, np.array([30]), np.array([11]))
    assert one is not None
    assert two == 2 * one
    assert longer == one + 6 * config["hidden_size"] * config["vocab_size"]


def test_experts_cost_what_is_active() -> None:
    config = tiny_config("qwen3_moe")
    doubled = dict(config, num_experts_per_tok=2 * config["num_experts_per_tok"])
    lengths = np.array([20]), np.array([20])
    expert = 3 * config["hidden_size"] * config["moe_intermediate_size"]
    extra = 6 * 20 * config["num_hidden_layers"] * config["num_experts_per_tok"] * expert
    assert training_flops(doubled, *lengths) == training_flops(config, *lengths) + extra


@pytest.mark.parametrize(
    "fields", [{"kv_lora_rank": 512}, {"layer_types": ["linear_attention"]}, {"hidden_size": None}]
)
def test_other_models_have_no_count(fields: dict[str, Any]) -> None:
    config = {name: value for name, value in (tiny_config("qwen3") | fields).items() if value is not None}
    assert training_flops(config, np.array([4]), np.array([2])) is None
