"""Functions for --custom-model-provider-path. Megatron is imported inside: it must be there first."""

from __future__ import annotations

import dataclasses
from typing import Any


def with_all_arguments(pre_process: bool, post_process: bool, vp_stage: int | None = None, **options: Any) -> Any:
    """A GPTModel of the user's that notes how often it ran."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    class Counting(GPTModel):
        num_forwards = 0

        def forward(self, *args: Any, **further: Any) -> Any:
            self.num_forwards += 1
            return super().forward(*args, **further)

    return Counting(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage, **options)


def with_positions_alone(pre_process: bool, post_process: bool) -> Any:
    """All that the documented form is sure of: the tiny Qwen3, described by the user."""
    import torch
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slime.backends.megatron_utils.layers import block_spec

    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
    )
    return GPTModel(
        config,
        block_spec(config, transformer_engine=False),
        vocab_size=320,
        max_sequence_length=4096,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        rotary_base=10000,
        share_embeddings_and_output_weights=False,
    )


def from_global_args(pre_process: bool, post_process: bool, **options: Any) -> Any:
    """As providers of Megatron-LM make a GPTModel: out of what `get_args()` says; its layers alone are slime's."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = note_global_args()
    assert args is get_args()
    return GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=options["transformer_layer_spec"],
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        vp_stage=options.get("vp_stage"),
    )


SEEN: list[Any] = []


def note_global_args(*call: Any) -> Any:
    """A hook, whatever it is called with, that notes what `get_args()` returns."""
    from megatron.training import get_args

    SEEN.append(get_args())
    return SEEN[-1]


def not_a_model(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> Any:
    """A part of one."""
    import torch

    return torch.nn.Linear(2, 2)


def another_stage(pre_process: bool, post_process: bool, **options: Any) -> Any:
    """One that never has an output layer."""
    return with_all_arguments(pre_process, False, **options)


def of_another_width(pre_process: bool, post_process: bool, config: Any, **options: Any) -> Any:
    """One whose MLP is wider than that of the weights."""
    wider = dataclasses.replace(config, ffn_hidden_size=160)
    return with_all_arguments(pre_process, post_process, config=wider, **options)


def with_fewer_layers(pre_process: bool, post_process: bool, transformer_layer_spec: Any, **options: Any) -> Any:
    """One that leaves the last layer out."""
    spec = dataclasses.replace(transformer_layer_spec, layer_specs=transformer_layer_spec.layer_specs[:-1])
    return with_all_arguments(pre_process, post_process, transformer_layer_spec=spec, **options)


def without_query_norms(pre_process: bool, post_process: bool, transformer_layer_spec: Any, **options: Any) -> Any:
    """One that would not use some of the weights."""
    from megatron.core.transformer.identity_op import IdentityOp

    for layer in transformer_layer_spec.layer_specs:
        layer.submodules.self_attention.submodules.q_layernorm = IdentityOp
    return with_all_arguments(pre_process, post_process, transformer_layer_spec=transformer_layer_spec, **options)


def with_a_parameter_more(pre_process: bool, post_process: bool, **options: Any) -> Any:
    """One of whose weights engines know nothing."""
    import torch

    lm = with_all_arguments(pre_process, post_process, **options)
    lm.decoder.layers[0].gate = torch.nn.Parameter(torch.zeros(1))
    return lm
