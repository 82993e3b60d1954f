"""Flags that slime does not declare, and which Megatron is found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from slime.arguments import Args
from slime.backends.megatron_utils.arguments import check_megatron
from slime.backends.megatron_utils.find import find_megatron
from slime.backends.megatron_utils.flags import further_settings
from slime.config.base import ConfigError

RIGHT = ["--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "128", "--num-attention-heads", "4"]
RIGHT += ["--vocab-size", "320", "--group-query-attention", "--num-query-groups", "2", "--kv-channels", "16"]
RIGHT += ["--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--qk-layernorm"]
RIGHT += ["--normalization", "RMSNorm", "--norm-epsilon", "1e-6", "--use-rotary-position-embeddings"]


def test_model_arguments_are_compared_with_the_model_and_set_nothing(model: Path) -> None:
    words = [*RIGHT, "--attention-backend", "flash", "--seq-length", "4096", "--max-position-embeddings", "4096"]
    assert further_settings(words, find_megatron(), str(model)) == {}
    with pytest.raises(ConfigError, match="--rotary-base: the model arguments say 5, config.json says 10000"):
        further_settings([*words, "--rotary-base", "5"], find_megatron(), str(model))


def test_a_flag_that_this_megatron_lacks_is_refused(model: Path) -> None:
    megatron = find_megatron()._replace(has_training=False)
    with pytest.raises(ConfigError, match="Unknown setting --fly .Megatron-core 0.*without megatron.training"):
        further_settings(["--fly"], megatron, str(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ckpt_format": "torch", "expert_tensor_parallel_size": 2}, "--expert-tensor-parallel-size must divide"),
        ({"megatron_args": {"mtp_num_layers": 1}}, "--mtp-num-layers: layers for .* are not trained"),
        ({"advantage_estimator": "ppo", "critic_num_gpus_per_node": 3, "tensor_model_parallel_size": 2}, "The 3 ranks"),
        ({"megatron_args": {"optimizer_cpu_offload": True}}, "--fsdp-cpu-offload"),
        ({"moe_grouped_gemm": True}, "needs Transformer Engine"),
        ({"device": "cpu"}, "Megatron trains on GPUs"),
        ({"expert_model_parallel_size": 3, "device": "cuda"}, "--expert-model-parallel-size 3"),
        ({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, "--expert-tensor-parallel-size 1 beside"),
    ],
)
def test_what_this_backend_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    args = Args(**{"train_backend": "megatron", "device": "cuda", "actor_num_gpus_per_node": 4} | settings)
    with pytest.raises(ConfigError, match=message):
        check_megatron(args, args)


def test_ranks_that_hold_one_model_share_their_samples() -> None:
    args = Args(train_backend="megatron", actor_num_gpus_per_node=8, tensor_model_parallel_size=2)
    assert args.num_data_ranks == 4
    both = dataclasses.replace(args, pipeline_model_parallel_size=2, context_parallel_size=2)
    assert both.num_data_ranks == 1


def test_what_is_found_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = str(find_megatron())
    assert found.startswith("Megatron-core 0.")
    assert "Transformer Engine" in found
    monkeypatch.setenv("MEGATRON_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="holds no megatron/core"):
        find_megatron()
