"""`megatron.training.get_args()` in trainers."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_providers import SEEN
from helpers.megatron_training import STEADY, make_megatron, two_rollouts
from helpers.model_families import write_tiny_model
from helpers.training import settings_for

from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.megatron_utils.find import find_megatron

CPU = torch.device("cpu")


def small_parser() -> argparse.ArgumentParser:
    """A few flags as Megatron-LM has them, with its defaults."""
    parser = argparse.ArgumentParser()
    for flag in ("--num-layers", "--hidden-size", "--num-experts", "--seq-length", "--padded-vocab-size"):
        parser.add_argument(flag, type=int, default=None)
    parser.add_argument("--norm-epsilon", "--layernorm-epsilon", dest="layernorm_epsilon", type=float, default=1e-5)
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    parser.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    parser.add_argument("--no-bias-swiglu-fusion", action="store_false", dest="bias_swiglu_fusion")
    parser.add_argument("--no-persist-layer-norm", action="store_true")
    parser.add_argument("--cp-comm-type", nargs="+", default=["p2p"])
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--split", default="969, 30, 1")
    return parser


def global_args(
    model: Path, *, is_critic: bool = False, megatron: dict[str, Any] | None = None, **settings: Any
) -> Any:
    from slime.backends.megatron_utils.global_args import made_of, namespace_of

    run, cfg = settings_for(model, **settings), MegatronConfig(**megatron or {})
    made = made_of(run, cfg, CPU, transformer_engine=False, is_critic=is_critic)
    return namespace_of(small_parser(), run, cfg, made)


def test_they_have_megatrons_names_with_the_values_of_the_run(model: Path) -> None:
    args = global_args(model, plugin_settings={"curriculum": 3}, lr=0.5, bf16=False, rollout_max_context_len=64)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_query_groups) == (2, 64, 128, 2)
    assert (args.layernorm_epsilon, args.normalization) == (1e-6, "RMSNorm")
    assert (args.swiglu, args.add_bias_linear) == (True, False)
    assert (args.num_experts, args.kv_channels, args.padded_vocab_size) == (None, 16, 320)
    assert (args.params_dtype, args.bf16, args.fp16) == (torch.float32, False, False)
    assert (args.transformer_impl, args.position_embedding_type) == ("local", "rope")
    assert (args.bias_swiglu_fusion, args.no_persist_layer_norm, args.cp_comm_type) == (False, True, ["p2p"])
    assert (args.rank, args.world_size, args.data_parallel_size, args.tensor_model_parallel_size) == (0, 1, 1, 1)
    assert (args.seq_length, args.max_position_embeddings) == (64, 2048)
    assert (args.curriculum, args.split) == (3, "969, 30, 1")
    assert (args.lr, args.advantage_estimator, args.hf_checkpoint) == (0.5, "grpo", str(model))


def test_what_slime_sets_where_nobody_else_does_is_there_too(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_tiny_model("deepseek_v3", model)
    given = {"expert_model_parallel_size": 2, "megatron_args": {"persist_layer_norm": True, "moe_z_loss_coeff": 0.5}}
    args = global_args(model, megatron=given, plugin_settings={"seq_length": 4096})
    assert args.multi_latent_attention
    assert args.num_experts == args.num_moe_experts > 1
    assert (args.moe_router_dtype, args.moe_router_load_balancing_type) == ("fp32", "none")
    assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (2, 1)
    assert (args.moe_z_loss_coeff, args.persist_layer_norm, args.no_persist_layer_norm) == (0.5, True, False)
    assert args.seq_length == args.encoder_seq_length == 4096


def test_a_critics_output_is_its_own(model: Path) -> None:
    assert global_args(model, is_critic=True).untie_embeddings_and_output_weights


def test_they_are_a_copy(model: Path) -> None:
    run, cfg = settings_for(model, plugin_settings={"stages": [1]}), MegatronConfig()
    from slime.backends.megatron_utils.global_args import made_of, namespace_of

    made = made_of(run, cfg, CPU, transformer_engine=False, is_critic=False)
    args = namespace_of(small_parser(), run, cfg, made)
    args.lr = 7.0
    args.stages.append(2)
    args.plugin_settings["stages"].append(3)
    assert run.lr != 7.0
    assert run.plugin_settings == {"stages": [1]}


# --- a Megatron-LM checkout


@pytest.fixture
def checkout() -> None:
    if not find_megatron().has_training:
        pytest.skip("needs a Megatron-LM checkout on PYTHONPATH or in MEGATRON_PATH")
    try:
        import megatron.training  # noqa: F401
    except ImportError as error:
        pytest.skip(f"megatron.training cannot be imported: {error}")


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_a_model_made_of_them_trains_as_slimes_own(family: str, tmp_path: Path) -> None:
    from slime.backends.megatron_utils.start import open_backend

    hook = "helpers.megatron_providers.note_global_args"
    model = tmp_path / "model"
    write_tiny_model(family, model, vocab_size=320, initializer_range=0.2)
    args = settings_for(model, train_backend="megatron", use_kl_loss=True, kl_loss_coef=0.1, **STEADY)
    hooked = dataclasses.replace(
        args,
        custom_model_provider_path="helpers.megatron_providers.from_global_args",
        custom_megatron_init_path=hook,
        custom_megatron_before_log_prob_hook_path=hook,
        custom_megatron_before_train_step_hook_path=hook,
    )
    SEEN.clear()
    own: Any = open_backend(hooked, hooked, CPU)
    usual = make_megatron(args)
    own.load(), usual.load()
    found, expected = (two_rollouts(backend, args, tmp_path) for backend in (own, usual))
    assert found.metrics == expected.metrics
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())
    assert len(SEEN) > 4
    assert len({id(namespace) for namespace in SEEN}) == 1
    assert SEEN[0].num_layers == own.config.num_layers
    assert SEEN[0].data_path is None
    assert SEEN[0].custom_model_provider_path == hooked.custom_model_provider_path


@pytest.mark.usefixtures("checkout")
def test_nothing_else_of_megatron_lm_is_started() -> None:
    from megatron.core import num_microbatches_calculator
    from megatron.training import global_vars

    others = ("TOKENIZER", "TENSORBOARD_WRITER", "WANDB_WRITER", "TIMERS", "SIGNAL_HANDLER")
    assert all(getattr(global_vars, f"_GLOBAL_{name}") is None for name in others)
    assert num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None
