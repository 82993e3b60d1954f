"""From a config.json to a ModelShape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slime.backends.megatron_utils.names.families import FAMILIES, Family
from slime.backends.megatron_utils.names.model_shape import ModelShape, NameMapError


def family_of(shape: ModelShape) -> Family:
    """The tables of a shape."""
    return FAMILIES[shape.family]


def shape_of(config: Any) -> ModelShape:
    """The shape that a transformers config describes. Raises NameMapError where no family file covers it."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NameMapError(
            f"config.json: model_type {config.model_type} has no Megatron name map; known: {', '.join(FAMILIES)}. "
            "docs/add-a-model.md shows how to add one."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise NameMapError(
            "config.json: quantized weights have no Megatron counterpart; convert them to bfloat16 first."
        )
    return family.shape(config)


def read_shape(directory: str | Path) -> ModelShape:
    """The shape of the model in an HF directory."""
    from transformers import AutoConfig

    return shape_of(AutoConfig.from_pretrained(directory))
