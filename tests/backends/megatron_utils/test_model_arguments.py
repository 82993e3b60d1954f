from __future__ import annotations

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.model_families import CONFIGS
from transformers import AutoConfig

from scripts.random_checkpoint import SHAPES
from slime.backends.megatron_utils.model_arguments import (
    as_flags,
    check_given,
    choices,
    facts,
    given_flags,
    gpt_model_options,
    model_args_of_script,
    transformer_config_fields,
)
from slime.backends.megatron_utils.names import ModelShape, NameMapError, shape_of

SCRIPTS = Path(__file__).parents[3] / "scripts" / "models"
QWEN3_4B = """--num-layers 36 --hidden-size 2560 --ffn-hidden-size 9728 --swiglu --vocab-size 151936
--disable-bias-linear
--num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm
--normalization RMSNorm --norm-epsilon 1e-6 --use-rotary-position-embeddings --rotary-base 1000000"""


def shape_named(name: str) -> ModelShape:
    return shape_of(AutoConfig.for_model(**SHAPES[name]))


def test_the_documented_arguments_of_qwen3_4b_are_derived() -> None:
    assert as_flags(facts(shape_named("qwen3-4B"))) == QWEN3_4B.split()


@pytest.mark.parametrize("name", SHAPES)
def test_the_script_of_a_model_says_what_its_config_says(name: str) -> None:
    shape = shape_named(name)
    words = model_args_of_script(SCRIPTS / f"{name}.sh")
    assert words == as_flags([*facts(shape), *choices(shape)])
    check_given(shape, given_flags(words))


def test_every_script_has_a_shape_and_bash_reads_the_same_words() -> None:
    assert {path.stem for path in SCRIPTS.iterdir()} == SHAPES.keys()
    path = SCRIPTS / "deepseek-v3.sh"
    command = f'set -eu; source {path}; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    assert found.stdout.splitlines() == model_args_of_script(path)


def test_published_parameter_counts_come_out_of_the_shapes() -> None:
    """Billions, as model cards say; shapes with a wrong number would not."""
    from slime.backends.megatron_utils.names import all_parameters

    published = {"qwen2.5-0.5B": 0.49, "qwen2.5-14B": 14.8, "qwen2.5-72B": 72.7, "qwen3-0.6B": 0.596, "qwen3-32B": 32.8}
    published |= {"qwen3-30B-A3B": 30.5, "qwen3-235B-A22B": 235.1, "glm4-9B": 9.4, "glm4.5-106B-A12B": 106.9}
    published |= {"glm4.5-355B-A32B": 353, "llama3-8B": 8.03, "llama3.1-70B": 70.6, "llama3.2-1B": 1.24}
    published |= {"llama3.2-3B": 3.21, "deepseek-v3": 671, "qwen2.5-7B": 7.62, "qwen2.5-32B": 32.8, "qwen3-4B": 4.02}
    for name, billions in published.items():
        shape = shape_named(name)
        sizes = {tensor.name: tensor.shape for parameter in all_parameters(shape) for tensor in parameter.hf}
        total = sum(math.prod(size) for size in sizes.values())
        assert total / 1e9 == pytest.approx(billions, rel=0.01), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--rotary-base 10000", "--rotary-base: the model arguments say 10000, config.json says 1000000."),
        ("--norm-epsilon 1e-5", "--norm-epsilon: the model arguments say 1e-5, config.json says 1e-6."),
        ("--num-layers 35", "--num-layers: the model arguments say 35, config.json says 36."),
        ("--add-qkv-bias", "--add-qkv-bias: the model arguments say yes, config.json says nothing."),
        ("--untie-embeddings-and-output-weights", "the model arguments say yes, config.json says nothing."),
        ("--num-experts 8", "--num-experts: the model arguments say 8, config.json says nothing."),
        ("--normalization LayerNorm", "the model arguments say LayerNorm, config.json says RMSNorm."),
        ("--rotary-percent=0.5", "--rotary-percent: the model arguments say 0.5, config.json says 1."),
    ],
)
def test_a_difference_from_config_json_names_the_flag_and_both_values(change: str, message: str) -> None:
    with pytest.raises(NameMapError, match=re.escape(message)):
        check_given(shape_named("qwen3-4B"), given_flags(QWEN3_4B.split() + change.split()))


@pytest.mark.parametrize("flag", ["--qk-layernorm", "--swiglu", "--rotary-base", "--num-query-groups"])
def test_an_argument_left_out_counts_as_megatrons_default(flag: str) -> None:
    words = " ".join(QWEN3_4B.split())
    without = re.sub(rf"{flag}( [^-]\S*)?", "", words).split()
    with pytest.raises(NameMapError, match=flag):
        check_given(shape_named("qwen3-4B"), given_flags(without))


def test_other_spellings_of_the_same_arguments_pass() -> None:
    shape = shape_named("qwen3-4B")
    words = QWEN3_4B.replace("--use-rotary-position-embeddings", "--position-embedding-type rope").replace(
        "1e-6", "1e-06"
    )
    check_given(shape, given_flags([*words.split(), "--seq-length", "4096", "--tensor-model-parallel-size", "2"]))
    plain = replace(shape, rotary_base=10000)
    check_given(plain, given_flags(QWEN3_4B.replace("--rotary-base 1000000", "").split()))
    moe = shape_named("qwen3-30B-A3B")
    check_given(moe, given_flags([*as_flags(facts(moe)), "--moe-layer-freq", "([1]*48)"]))
    glm = shape_named("glm4.5-106B-A12B")
    words = as_flags(facts(glm))
    words[words.index("--moe-layer-freq") + 1] = str([0] + [1] * 45)
    check_given(glm, given_flags(words))
    words[words.index("--moe-layer-freq") + 1] = "__import__('os').getpid()"
    with pytest.raises(NameMapError, match=r"--moe-layer-freq: the model arguments say __import__"):
        check_given(glm, given_flags(words))


def test_fields_and_options_say_the_same_as_flags() -> None:
    shape = shape_of(AutoConfig.for_model(**CONFIGS["llama"]))
    options = gpt_model_options(shape)
    assert options["rope_scaling"] and options["rope_scaling_factor"] == 8.0 and options["rotary_base"] == 5e5
    assert "--use-rope-scaling" in as_flags(facts(shape))
    fields = transformer_config_fields(shape_named("glm4.5-355B-A32B"))
    expected: dict[str, Any] = {"num_layers": 92, "num_moe_experts": 160, "moe_router_topk_scaling_factor": 2.5}
    assert {name: fields[name] for name in expected} == expected
    assert fields["moe_layer_freq"] == [0] * 3 + [1] * 89


def test_what_megatrons_parser_cannot_say_is_refused_as_a_flag() -> None:
    config = SHAPES["deepseek-v3"] | {"rope_parameters": SHAPES["deepseek-v3"]["rope_parameters"] | {"beta_fast": 16.0}}
    shape = shape_of(AutoConfig.for_model(**config))
    assert transformer_config_fields(shape)["beta_fast"] == 16.0
    with pytest.raises(NameMapError, match="Megatron's parser has no --beta-fast, config.json says 16"):
        as_flags(facts(shape))
