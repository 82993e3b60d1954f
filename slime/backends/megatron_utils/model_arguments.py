"""Megatron's model arguments derived from config.json: as flags, as TransformerConfig fields, compared with given ones.

`facts` are what the weights fix, so that a different value is an error; `choices` are what slime sets where nobody else
does (experts without losses and updates of their own, since RL's loss is the only one).
"""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slime.backends.megatron_utils.names import ModelShape, NameMapError
from slime.backends.megatron_utils.names.model_shape import MLA, MoE

SWITCH = True  # the value of a flag that takes none


class Argument(NamedTuple):
    """A flag of Megatron's parser, its value, and the field of TransformerConfig that it sets; "": none."""

    flag: str
    value: Any
    field: str = ""


_ALIASES = {"--layernorm-epsilon": "--norm-epsilon", "--num-moe-experts": "--num-experts"}
_DEFAULTS: dict[str, Any] = {  # of Megatron's parser, where a flag is not given
    "--norm-epsilon": 1e-5,
    "--rotary-base": 10000,
    "--rotary-percent": 1.0,
    "--moe-router-score-function": "softmax",
    "--moe-layer-freq": 1,
    "--rope-scaling-factor": 8.0,
    "--rotary-scaling-factor": 1.0,
    "--mscale": 1.0,
    "--mscale-all-dim": 0.0,
}
_VOCABULARY = {"--make-vocab-size-divisible-by": 128, "--tensor-model-parallel-size": 1}
# Fields of MLATransformerConfig with their defaults, for which Megatron's parser has no flags.
_WITHOUT_FLAG = {"--original-max-position-embeddings": 4096, "--beta-fast": 32.0, "--beta-slow": 1.0}


def facts(shape: ModelShape) -> list[Argument]:
    """What config.json says of the model, in the order of the scripts in scripts/models."""
    return [
        Argument("--num-layers", shape.num_layers, "num_layers"),
        Argument("--hidden-size", shape.hidden_size, "hidden_size"),
        Argument("--ffn-hidden-size", shape.ffn_size, "ffn_hidden_size"),
        Argument("--swiglu", SWITCH),
        Argument("--vocab-size", shape.vocab_size),
        Argument("--disable-bias-linear", SWITCH),
        *_switch(not shape.tied, Argument("--untie-embeddings-and-output-weights", SWITCH)),
        *_attention(shape),
        Argument("--normalization", "RMSNorm", "normalization"),
        Argument("--norm-epsilon", shape.norm_eps, "layernorm_epsilon"),
        *_switch(shape.sandwich_norms, Argument("--post-self-attn-layernorm", SWITCH)),
        *_switch(shape.sandwich_norms, Argument("--post-mlp-layernorm", SWITCH)),
        *_positions(shape),
        *(_experts(shape, shape.moe) if shape.moe is not None else ()),
    ]


def choices(shape: ModelShape) -> list[Argument]:
    """What slime sets where the user does not."""
    if shape.moe is None:
        return []
    return [
        Argument("--moe-token-dispatcher-type", "alltoall", "moe_token_dispatcher_type"),
        Argument("--moe-aux-loss-coeff", 0, "moe_aux_loss_coeff"),
        Argument("--moe-router-dtype", "fp32", "moe_router_dtype"),
        # no flags: slime sets these two itself
        Argument("", "none", "moe_router_load_balancing_type"),
        Argument("", 0.0, "moe_router_bias_update_rate"),
    ]


def _attention(shape: ModelShape) -> Iterator[Argument]:
    yield Argument("--num-attention-heads", shape.num_heads, "num_attention_heads")
    if shape.mla is not None:
        yield from _latent_attention(shape.mla)
        return
    yield Argument("--group-query-attention", SWITCH)
    yield Argument("--num-query-groups", shape.num_groups, "num_query_groups")
    yield Argument("--kv-channels", shape.head_size, "kv_channels")
    yield from _switch(shape.qkv_bias, Argument("--add-qkv-bias", SWITCH, "add_qkv_bias"))
    yield from _switch(shape.qk_norm, Argument("--qk-layernorm", SWITCH, "qk_layernorm"))


def _latent_attention(mla: MLA) -> Iterator[Argument]:
    yield Argument("--multi-latent-attention", SWITCH, "multi_latent_attention")
    yield Argument("--qk-layernorm", SWITCH, "qk_layernorm")
    if mla.q_rank is not None:
        yield Argument("--q-lora-rank", mla.q_rank, "q_lora_rank")
    yield Argument("--kv-lora-rank", mla.kv_rank, "kv_lora_rank")
    yield Argument("--qk-head-dim", mla.nope_size, "qk_head_dim")
    yield Argument("--qk-pos-emb-head-dim", mla.rope_size, "qk_pos_emb_head_dim")
    yield Argument("--v-head-dim", mla.v_size, "v_head_dim")


def _positions(shape: ModelShape) -> Iterator[Argument]:
    yield Argument("--use-rotary-position-embeddings", SWITCH)
    base, scaling = shape.rotary_base, shape.rope_scaling
    yield Argument("--rotary-base", int(base) if base == int(base) else base, "rotary_base" if shape.mla else "")
    if shape.rotary_percent != 1.0:
        yield Argument("--rotary-percent", shape.rotary_percent)
    yield from _switch(shape.rotary_interleaved, Argument("--rotary-interleaved", SWITCH, "rotary_interleaved"))
    if shape.mla is not None:
        yield Argument("--rope-type", "yarn" if scaling is not None else "rope", "rope_type")
    if scaling is None:
        return
    if scaling.kind == "llama3":
        yield Argument("--use-rope-scaling", SWITCH)
        yield Argument("--rope-scaling-factor", scaling.factor)
        return
    if shape.mla is None:
        raise NameMapError("config.json: rope_type yarn is known for latent attention only")
    yield Argument("--rotary-scaling-factor", scaling.factor, "rotary_scaling_factor")
    yield Argument("--original-max-position-embeddings", scaling.original_length, "original_max_position_embeddings")
    yield Argument("--beta-fast", scaling.beta_fast, "beta_fast")
    yield Argument("--beta-slow", scaling.beta_slow, "beta_slow")
    yield Argument("--mscale", scaling.mscale, "mscale")
    yield Argument("--mscale-all-dim", scaling.mscale_all_dim, "mscale_all_dim")


def _experts(shape: ModelShape, moe: MoE) -> Iterator[Argument]:
    yield Argument("--num-experts", moe.num_experts, "num_moe_experts")
    yield Argument("--moe-ffn-hidden-size", moe.ffn_size, "moe_ffn_hidden_size")
    yield Argument("--moe-router-topk", moe.top_k, "moe_router_topk")
    if moe.num_dense_layers:
        pattern = [0] * moe.num_dense_layers + [1] * (shape.num_layers - moe.num_dense_layers)
        yield Argument("--moe-layer-freq", pattern, "moe_layer_freq")
    if moe.shared_ffn_size:
        field = "moe_shared_expert_intermediate_size"
        yield Argument("--moe-shared-expert-intermediate-size", moe.shared_ffn_size, field)
    yield Argument("--moe-router-score-function", moe.scores, "moe_router_score_function")
    yield from _switch(
        moe.has_bias, Argument("--moe-router-enable-expert-bias", SWITCH, "moe_router_enable_expert_bias")
    )
    if moe.num_groups > 1:
        yield Argument("--moe-router-num-groups", moe.num_groups, "moe_router_num_groups")
        yield Argument("--moe-router-group-topk", moe.top_groups, "moe_router_group_topk")
    if moe.scale != 1.0:
        yield Argument("--moe-router-topk-scaling-factor", moe.scale, "moe_router_topk_scaling_factor")


def _switch(is_on: bool, argument: Argument) -> Iterator[Argument]:
    if is_on:
        yield argument


def as_flags(arguments: Sequence[Argument]) -> list[str]:
    """A command line: ["--num-layers", "36", "--swiglu", ...]. Raises NameMapError where Megatron has no such flag."""
    words = []
    for argument in (argument for argument in arguments if argument.flag):
        if argument.flag in _WITHOUT_FLAG:
            if argument.value != _WITHOUT_FLAG[argument.flag]:
                raise NameMapError(f"Megatron's parser has no {argument.flag}, config.json says {argument.value}")
            continue
        words.append(argument.flag)
        if argument.value is not SWITCH:
            words.append(_as_text(argument.value))
    return words


def transformer_config_fields(shape: ModelShape) -> dict[str, Any]:
    """Keyword arguments of Megatron-core's TransformerConfig (MLATransformerConfig with latent attention)."""
    from torch.nn.functional import silu

    fields = {a.field: a.value for a in (*facts(shape), *choices(shape)) if a.field}
    if shape.mla is not None and shape.mla.q_rank is None:
        fields["q_lora_rank"] = None
    # the post-norms are no fields of Megatron-core's config: a layer spec adds them
    return fields | {"gated_linear_unit": True, "activation_func": silu, "add_bias_linear": False}


def gpt_model_options(shape: ModelShape) -> dict[str, Any]:
    """Keyword arguments of Megatron-core's GPTModel that config.json fixes, besides the vocabulary's padded size."""
    scaling = shape.rope_scaling if shape.rope_scaling is not None and shape.rope_scaling.kind == "llama3" else None
    return {
        "position_embedding_type": "rope",
        "rotary_base": shape.rotary_base,
        "rotary_percent": shape.rotary_percent,
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": 8.0 if scaling is None else scaling.factor,
        "share_embeddings_and_output_weights": shape.tied,
    }


def given_flags(words: Sequence[str]) -> dict[str, str | bool]:
    """Flags of a command line with their values; several values are one text. A flag given twice has its last value."""
    found: dict[str, str | bool] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, has_value, value = word.partition("=")
            flag = _ALIASES.get(flag, flag)
            found[flag] = value if has_value else SWITCH
        elif not flag:
            raise NameMapError(f"model arguments must start with a flag, got {word}")
        else:
            found[flag] = word if found[flag] is SWITCH else f"{found[flag]} {word}"
    return found


def model_args_of_script(path: Path) -> list[str]:
    """The words of `MODEL_ARGS=( ... )` in a script of scripts/models; comments left out."""
    _, _, rest = path.read_text().partition("MODEL_ARGS=(")
    body, end, _ = rest.partition("\n)")
    if not end:
        raise NameMapError(f"{path} has no MODEL_ARGS=( ... )")
    return shlex.split(body, comments=True)


class Given:
    """Model arguments that a user gave on a command line; none at all means that they are to be derived."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.flags = given_flags(words)

    @property
    def not_compared(self) -> list[str]:
        """Flags that config.json says nothing about."""
        return [flag for flag in self.flags if flag not in MODEL_FLAGS and flag not in _VOCABULARY]

    def check(self, shape: ModelShape) -> None:
        """Raise NameMapError where they differ from config.json."""
        if self.flags:
            check_given(shape, self.flags)

    def stacks_layers(self, shape: ModelShape) -> bool:
        """Whether Megatron-core stacks the layers in a checkpoint: not where --moe-layer-freq is a list."""
        is_list = isinstance(_value_of(str(self.flags.get("--moe-layer-freq", 1))), list)
        return not is_list and (shape.moe is None or shape.moe.num_dense_layers == 0)

    @property
    def vocabulary_divisor(self) -> int:
        """Megatron pads the vocabulary to a multiple of it."""
        divisor, ranks = (int(self.flags.get(flag, default)) for flag, default in _VOCABULARY.items())
        return divisor * ranks


def check_given(shape: ModelShape, given: Mapping[str, str | bool]) -> None:
    """Raise NameMapError, naming the flag and both values, where given model arguments differ from config.json.

    given: as from `given_flags`; flags that config.json says nothing about are not looked at.
    """
    derived = {argument.flag: argument.value for argument in facts(shape)}
    given = {flag: value for flag, value in given.items() if flag in MODEL_FLAGS}
    if given.pop("--position-embedding-type", None) == "rope":
        given["--use-rotary-position-embeddings"] = SWITCH
    for flag in [*derived, *sorted(given.keys() - derived.keys())]:
        expected = derived.get(flag, _default(shape, flag))
        found = given.get(flag, _default(shape, flag))
        if not _same(found, expected):
            raise NameMapError(
                f"{flag}: the model arguments say {_as_text(found)}, config.json says {_as_text(expected)}. "
                "Leave the model arguments out to have them derived, or correct the flag."
            )


def _default(shape: ModelShape, flag: str) -> Any:
    if flag == "--kv-channels":
        return shape.hidden_size // shape.num_heads
    if flag == "--rope-type":
        return None if shape.mla is None else "yarn"
    return _WITHOUT_FLAG.get(flag, _DEFAULTS.get(flag))


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, str) and not isinstance(expected, str):
        found = _value_of(found)
    if isinstance(expected, list) and isinstance(found, int) and not isinstance(found, bool):
        found = [int(layer % found == 0) for layer in range(len(expected))]
    if isinstance(found, list) and expected == 1:  # every layer has experts
        return set(found) == {1}
    return bool(found == expected)


def _value_of(text: str) -> Any:
    """A number, or a list such as "([0]*3+[1]*58)"; text that is neither, as it is."""
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        return text


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            return left * right
        raise ValueError(ast.dump(node))
    return ast.literal_eval(node)


def _as_text(value: Any) -> str:
    match value:
        case None | False:
            return "nothing"
        case True:
            return "yes"
        case list():
            return f"([0]*{value.count(0)}+[1]*{value.count(1)})"
        case float():
            return f"{value:g}".replace("e-0", "e-")
    return str(value)


MODEL_FLAGS = frozenset(
    {
        *("--num-layers", "--hidden-size", "--ffn-hidden-size", "--swiglu", "--vocab-size", "--disable-bias-linear"),
        *("--untie-embeddings-and-output-weights", "--num-attention-heads", "--group-query-attention"),
        *("--num-query-groups", "--kv-channels", "--add-qkv-bias", "--qk-layernorm", "--normalization"),
        *("--norm-epsilon", "--post-self-attn-layernorm", "--post-mlp-layernorm", "--position-embedding-type"),
        *("--use-rotary-position-embeddings", "--rotary-base", "--rotary-percent", "--rotary-interleaved"),
        *("--use-rope-scaling", "--rope-scaling-factor", "--rotary-scaling-factor", "--rope-type", "--beta-fast"),
        *("--beta-slow", "--mscale", "--mscale-all-dim", "--original-max-position-embeddings"),
        *("--multi-latent-attention", "--q-lora-rank", "--kv-lora-rank", "--qk-head-dim", "--qk-pos-emb-head-dim"),
        *("--v-head-dim", "--num-experts", "--moe-ffn-hidden-size", "--moe-router-topk", "--moe-layer-freq"),
        *("--moe-shared-expert-intermediate-size", "--moe-router-score-function", "--moe-router-enable-expert-bias"),
        *("--moe-router-num-groups", "--moe-router-group-topk", "--moe-router-topk-scaling-factor"),
    }
)
