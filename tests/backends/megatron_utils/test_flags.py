"""Flags that slime does not declare, and which Megatron is found."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.arguments import ALL_GROUPS, Args, parse_args
from slime.backends.megatron_utils.arguments import check_megatron
from slime.backends.megatron_utils.extra_args import documented_provider, own_settings
from slime.backends.megatron_utils.find import find_megatron
from slime.backends.megatron_utils.flags import IGNORED, MODEL_FLAGS, further_settings, megatron_parser
from slime.config.base import ConfigError
from slime.config.flags import settings_of

RIGHT = ["--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "128", "--num-attention-heads", "4"]
RIGHT += ["--vocab-size", "320", "--group-query-attention", "--num-query-groups", "2", "--kv-channels", "16"]
RIGHT += ["--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--qk-layernorm"]
RIGHT += ["--normalization", "RMSNorm", "--norm-epsilon", "1e-6", "--use-rotary-position-embeddings"]


def test_model_arguments_are_compared_with_the_model_and_set_nothing(model: Path) -> None:
    words = [*RIGHT, "--seq-length", "4096", "--max-position-embeddings", "4096"]
    words = words if find_megatron().has_training else [*words, "--attention-backend", "flash"]
    lengths = {"seq_length": 4096, "max_position_embeddings": 4096}  # for plug-ins to read
    assert further_settings(words, find_megatron(), str(model)) == ({}, lengths)
    with pytest.raises(ConfigError, match="--seq-length must be a number of tokens, got '4k'"):
        further_settings([*words, "--seq-length", "4k"], find_megatron(), str(model))
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
        ({"optimizer": "sgd", "use_distributed_optimizer": True}, "--optimizer sgd with --use-distributed-optimizer"),
        ({"advantage_estimator": "ppo", "critic_num_gpus_per_node": 3, "tensor_model_parallel_size": 2}, "The 3 ranks"),
        ({"megatron_args": {"optimizer_cpu_offload": True}}, "optimizer_cpu_offload is a flag of its own"),
        ({"optimizer_cpu_offload": True, "optimizer": "sgd"}, "--optimizer-cpu-offload with --optimizer sgd"),
        ({"optimizer_offload_fraction": 0.5}, "--optimizer-offload-fraction: nothing is offloaded"),
        ({"moe_grouped_gemm": True}, "needs Transformer Engine"),
        ({"megatron_args": {"use_megatron_fsdp": True}}, "--use-megatron-fsdp is not for the Megatron backend"),
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


def test_a_checkout_goes_before_other_megatrons_and_behind_the_users_modules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    users, checkout, installed = (str(tmp_path / name) for name in ("users", "checkout", "installed"))
    for folder in (checkout, installed):
        (Path(folder) / "megatron" / "core").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [users, installed, *sys.path])
    monkeypatch.setenv("MEGATRON_PATH", checkout)
    find_megatron()
    assert sys.path[:3] == [users, checkout, installed]


# --- flags of the user's own


def add_own_flags(parser: Any) -> Any:
    group = parser.add_argument_group("own")
    group.add_argument("--curriculum", type=int, default=3)
    group.add_argument("--verbose-rewards", action="store_true")
    return parser


def test_flags_of_the_users_own_show_up_in_args_with_their_defaults(model: Path) -> None:
    flags = ["--hf-checkpoint", str(model), "--train-backend", "megatron", "--device", "cuda", "--num-rollout", "1"]
    flags += [
        "--rollout-batch-size",
        "1",
        "--prompt-data",
        "x",
        "--actor-num-gpus-per-node",
        "1",
        "--rm-type",
        "random",
    ]
    flags += ["--rollout-num-gpus", "1", "--rollout-engine", "embedded"]
    flags += ["--n-samples-per-prompt", "2"]
    args = parse_args([*flags, "--curriculum", "7"], extra_args_provider=add_own_flags)
    assert (args.curriculum, args.verbose_rewards) == (7, False)
    with pytest.raises(ConfigError, match="invalid int value: 'x'"):
        parse_args([*flags, "--curriculum", "x"], extra_args_provider=add_own_flags)
    with pytest.raises(ConfigError, match="--curriculum"):
        parse_args([*flags, "--curriculum", "7"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dest": "lr", "default": 1.0}, "adds --lr, which slime has"),
        ({"type": Path, "default": Path("x")}, "--it, of the extra_args_provider, must be text or a number"),
    ],
)
def test_a_setting_that_cannot_be_the_users_is_refused(options: dict[str, Any], message: str) -> None:
    def provider(parser: Any) -> Any:
        parser.add_argument("--it", **options)
        return parser

    with pytest.raises(ConfigError, match=message):
        own_settings([], provider, ["lr"])


PROVIDERS = {
    "def extra_args_provider(parser):\n    parser.add_argument('--mine', default='yes')\n    return parser\n": "yes",
    "from nowhere import extra_args_provider\n": None,
    "pretrain = lambda extra_args_provider: 1\nraise ValueError('imported')\n": "none",
}


@pytest.mark.parametrize("source", PROVIDERS)
def test_pretrain_gpt_is_imported_only_where_it_has_a_provider(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pretrain_gpt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pretrain_gpt", raising=False)
    if PROVIDERS[source] is None:
        with pytest.raises(
            ConfigError, match="has an extra_args_provider, but cannot be imported: No module named 'now"
        ):
            documented_provider()
        return
    provider = documented_provider()
    found = "none" if provider is None else own_settings([], provider, [])[0]["mine"]
    assert found == PROVIDERS[source]


# --- a Megatron-LM checkout


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    if not find_megatron().has_training:
        pytest.skip("needs a Megatron-LM checkout on PYTHONPATH or in MEGATRON_PATH")
    try:
        return megatron_parser()
    except ImportError as error:
        pytest.skip(f"its parser cannot be imported: {error}")


OF_ANOTHER_MEANING = {  # flags without effect whose name is like that of a field
    *("tp_comm_overlap_cfg", "te_rng_tracker", "start_weight_decay", "end_weight_decay", "grad_reduce_in_bf16"),
    *("model_parallel_size", "num_layers_per_virtual_pipeline_stage", "ddp_num_buckets", "hybrid_override_pattern"),
    *("gtp_remat_reduce_scatter_with_fp32_accumulation", "mamba_inference_ssm_states_dtype"),
    "yarn_original_max_position_embeddings",
}


def test_every_flag_of_the_megatron_found_sets_a_field_unless_none_is_meant(parser: argparse.ArgumentParser) -> None:
    from slime.backends.megatron_utils.effects import KINDS, as_fields, fields_of, has_effect

    declared = {flag for group in ALL_GROUPS for setting in settings_of(group) for flag in setting.flags}
    left = [action for action in parser._actions if not declared & {*action.option_strings}]
    left = [action for action in left if not (MODEL_FLAGS | IGNORED) & {*action.option_strings}]
    names = {name for action in left for name in as_fields({action.dest: "x"})}
    others = {name for name in names if not has_effect(name)}
    assert len(names - others) > 150 < len(others)
    fields = set().union(*map(fields_of, KINDS))
    alike = {name for name in others if difflib.get_close_matches(name, fields, 1, 0.8)}
    assert {name for name in alike if not name.startswith("rl_inference")} <= OF_ANOTHER_MEANING


def test_defaults_that_differ_from_megatrons_are_on_the_page(parser: argparse.ArgumentParser) -> None:
    defaults = {flag: action.default for action in parser._actions for flag in action.option_strings}
    page = (Path(__file__).parents[3] / "docs" / "megatron.md").read_text()
    _, _, listed = page.partition("Defaults that differ from Megatron's:")
    listed = listed.partition("**Models.**")[0]
    for setting in (setting for group in ALL_GROUPS for setting in settings_of(group)):
        flag = setting.flags[0]
        differs = flag in defaults and defaults[flag] != setting.default and defaults[flag] is not None
        assert not differs or f"`{flag} " in listed or f"`{flag}`" in listed, flag


def test_a_flag_of_megatron_lm_takes_effect_or_is_named(
    parser: argparse.ArgumentParser, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slime.backends.megatron_utils.effects import fields_for

    words = ["--no-persist-layer-norm", "--ddp-bucket-size", "7", "--attention-backend", "fused"]
    words += ["--moe-z-loss-coeff", "0.5", "--main-params-dtype", "fp16", "--data-path", "a", "b"]
    words += ["--recompute-activations"]
    fields, others = further_settings(words, find_megatron(), str(model))
    assert fields == {
        "persist_layer_norm": False,
        "bucket_size": 7,
        "attention_backend": "fused",
        "moe_z_loss_coeff": 0.5,
        "main_params_dtype": "fp16",
        "recompute_granularity": "selective",
    }
    assert others == {"data_path": ["a", "b"]}
    assert "without effect, for they belong to parts of Megatron-LM that slime does not use: --data-path" in caplog.text
    assert fields_for(DistributedDataParallelConfig, fields) == {"bucket_size": 7}
    assert fields_for(OptimizerConfig, fields) == {"main_params_dtype": torch.float16}
    assert fields_for(TransformerConfig, fields)["attention_backend"] is AttnBackend.fused
    with pytest.raises(ConfigError, match="Unknown setting --moe-z-los-coeff. Did you mean --moe-z-loss-coeff"):
        further_settings(["--moe-z-los-coeff", "1"], find_megatron(), str(model))
