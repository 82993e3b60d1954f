"""Rows of the tables, and those that families share.

A row says: this Megatron parameter is made of these HF tensors (name: axes) in this layout. Names are relative to the
layer (`decoder.layers.N.` and `model.layers.N.`); `{expert}` stands for an expert's number. Axes are those that
`ModelShape.size` knows, or numbers. Megatron names are the local spec's; `mapping.py` knows Transformer Engine's, which
fuses norms into linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slime.backends.megatron_utils.names.layouts import COLUMN, GATE_UP, REPLICATED, ROW, Layout, qkv
from slime.backends.megatron_utils.names.model_shape import ModelShape

Axes = tuple[str | int, ...]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter. is_copy: another row holds the same tensors and writes them."""

    megatron: str
    layout: Layout
    hf: Mapping[str, Axes]
    is_copy: bool = False


NORMS = (
    Row("input_layernorm.weight", REPLICATED, {"input_layernorm.weight": ("hidden",)}),
    Row("pre_mlp_layernorm.weight", REPLICATED, {"post_attention_layernorm.weight": ("hidden",)}),
)

GATED_MLP = (
    Row(
        "mlp.linear_fc1.weight",
        GATE_UP,
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    Row("mlp.linear_fc2.weight", ROW, {"mlp.down_proj.weight": ("hidden", "ffn")}),
)

EXPERTS = (
    Row("mlp.router.weight", REPLICATED, {"mlp.gate.weight": ("experts", "hidden")}),
    Row(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        GATE_UP,
        {
            "mlp.experts.{expert}.gate_proj.weight": ("expert_ffn", "hidden"),
            "mlp.experts.{expert}.up_proj.weight": ("expert_ffn", "hidden"),
        },
    ),
    Row(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        ROW,
        {"mlp.experts.{expert}.down_proj.weight": ("hidden", "expert_ffn")},
    ),
)

ROUTER_BIAS = (Row("mlp.router.expert_bias", REPLICATED, {"mlp.gate.e_score_correction_bias": ("experts",)}),)

SHARED_EXPERTS = (
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        GATE_UP,
        {
            "mlp.shared_experts.gate_proj.weight": ("shared_ffn", "hidden"),
            "mlp.shared_experts.up_proj.weight": ("shared_ffn", "hidden"),
        },
    ),
    Row("mlp.shared_experts.linear_fc2.weight", ROW, {"mlp.shared_experts.down_proj.weight": ("hidden", "shared_ffn")}),
)

_QK_NORM = (
    Row("self_attention.q_layernorm.weight", REPLICATED, {"self_attn.q_norm.weight": ("head",)}),
    Row("self_attention.k_layernorm.weight", REPLICATED, {"self_attn.k_norm.weight": ("head",)}),
)


def attention(shape: ModelShape) -> tuple[Row, ...]:
    """Attention with query groups; biases and QK norms where the shape has them."""
    weight = {
        "self_attn.q_proj.weight": ("queries", "hidden"),
        "self_attn.k_proj.weight": ("keys", "hidden"),
        "self_attn.v_proj.weight": ("keys", "hidden"),
    }
    bias = {name.replace(".weight", ".bias"): axes[:1] for name, axes in weight.items()}
    layout = qkv(shape.num_groups)
    return (
        Row("self_attention.linear_qkv.weight", layout, weight),
        *((Row("self_attention.linear_qkv.bias", layout, bias),) if shape.qkv_bias else ()),
        *(_QK_NORM if shape.qk_norm else ()),
        Row("self_attention.linear_proj.weight", ROW, {"self_attn.o_proj.weight": ("hidden", "queries")}),
    )


def latent_attention(shape: ModelShape) -> tuple[Row, ...]:
    """Multi-head latent attention; Megatron keeps heads in the order of the checkpoint."""
    assert shape.mla is not None
    low_rank = (
        Row("self_attention.linear_q_down_proj.weight", COLUMN, {"self_attn.q_a_proj.weight": ("q_rank", "hidden")}),
        Row("self_attention.q_layernorm.weight", REPLICATED, {"self_attn.q_a_layernorm.weight": ("q_rank",)}),
        Row(
            "self_attention.linear_q_up_proj.weight",
            COLUMN,
            {"self_attn.q_b_proj.weight": ("latent_queries", "q_rank")},
        ),
    )
    direct = (
        Row("self_attention.linear_q_proj.weight", COLUMN, {"self_attn.q_proj.weight": ("latent_queries", "hidden")}),
    )
    return (
        *(direct if shape.mla.q_rank is None else low_rank),
        Row(
            "self_attention.linear_kv_down_proj.weight",
            COLUMN,
            {"self_attn.kv_a_proj_with_mqa.weight": ("kv_rank_and_rope", "hidden")},
        ),
        Row("self_attention.kv_layernorm.weight", REPLICATED, {"self_attn.kv_a_layernorm.weight": ("kv_rank",)}),
        Row(
            "self_attention.linear_kv_up_proj.weight",
            COLUMN,
            {"self_attn.kv_b_proj.weight": ("latent_keys_values", "kv_rank")},
        ),
        Row("self_attention.linear_proj.weight", ROW, {"self_attn.o_proj.weight": ("hidden", "latent_values")}),
    )
