"""Qwen3, dense: norms of queries and keys."""

from __future__ import annotations

from typing import Any

from slime.backends.megatron_utils.names.family import Family, common_shape
from slime.backends.megatron_utils.names.model_shape import ModelShape, NameMapError
from slime.backends.megatron_utils.names.rows import GATED_MLP, NORMS, Row, attention


def _shape(config: Any) -> ModelShape:
    if config.attention_bias:
        raise NameMapError("config.json: attention_bias must be false for qwen3.")
    return common_shape(config, qk_norm=True)


def _layer_rows(shape: ModelShape, layer: int) -> tuple[Row, ...]:
    return (*NORMS, *attention(shape), *GATED_MLP)


FAMILY = Family(_shape, _layer_rows)
