"""Qwen2 and Qwen2.5: biases of queries, keys and values."""

from __future__ import annotations

from typing import Any

from slime.backends.megatron_utils.names.family import Family, common_shape
from slime.backends.megatron_utils.names.model_shape import ModelShape
from slime.backends.megatron_utils.names.rows import GATED_MLP, NORMS, Row, attention


def _shape(config: Any) -> ModelShape:
    return common_shape(config, qkv_bias=True)


def _layer_rows(shape: ModelShape, layer: int) -> tuple[Row, ...]:
    return (*NORMS, *attention(shape), *GATED_MLP)


FAMILY = Family(_shape, _layer_rows)
