"""What a family file declares, and how numbers are read from a config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slime.backends.megatron_utils.names.model_shape import ModelShape, NameMapError, RopeScaling
from slime.backends.megatron_utils.names.rows import Row


@dataclass(frozen=True)
class Family:
    """shape: from a transformers config. layer_rows: the parameters of a decoder layer (from 0)."""

    shape: Callable[[Any], ModelShape]
    layer_rows: Callable[[ModelShape, int], tuple[Row, ...]]


def common_shape(config: Any, **more: Any) -> ModelShape:
    """The numbers that every family's config names alike. more: what differs, by field of ModelShape."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    fields: dict[str, Any] = {
        "family": config.model_type,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "num_heads": config.num_attention_heads,
        "num_groups": config.num_key_value_heads,
        "head_size": head_size,
        "norm_eps": config.rms_norm_eps,
        "rotary_base": rope["rope_theta"],
        "rope_scaling": _rope_scaling(rope),
        "tied": bool(config.tie_word_embeddings),
        "num_mtp_layers": getattr(config, "num_nextn_predict_layers", None) or 0,
    }
    if config.hidden_act != "silu":
        raise NameMapError(f"config.json: hidden_act must be silu, got {config.hidden_act}.")
    if getattr(config, "use_sliding_window", False):
        raise NameMapError("config.json: use_sliding_window must be false; Megatron attends to all tokens.")
    return ModelShape(**fields | more)


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "llama3":
        # Megatron-core takes the factor alone: the other three numbers are constants there
        found = (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])
        if found != (1.0, 4.0, 8192):
            raise NameMapError(
                "config.json: llama3 rope scaling must have low_freq_factor 1, high_freq_factor 4 and "
                f"original_max_position_embeddings 8192, which are constants of Megatron-core; got {found}."
            )
        return RopeScaling("llama3", rope["factor"], 8192)
    if kind == "yarn":
        return _yarn(rope)
    raise NameMapError(f"config.json: rope_type must be default, llama3 or yarn, got {kind}.")


def _yarn(rope: dict[str, Any]) -> RopeScaling:
    """Of the ways in which transformers scales attention, those that Megatron-core has too."""
    mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    is_known = (mscale and of_all) or (not of_all and mscale in (None, 1))
    if not is_known or rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise NameMapError(
            "config.json: yarn rope scaling must have both mscale and mscale_all_dim or neither, no attention_factor "
            f"and no truncate, for Megatron-core; got {rope}."
        )
    numbers = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    optional = {name: rope[name] for name in numbers if rope.get(name) is not None}
    return RopeScaling("yarn", rope["factor"], rope["original_max_position_embeddings"], **optional)
