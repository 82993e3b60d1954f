"""What config.json says of a model, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slime.config.base import ConfigError


def check_model_directory(path: str, flag: str) -> None:
    """Raise ConfigError unless `path` is a directory with a config.json."""
    if not Path(path).is_dir():
        raise ConfigError(f"{flag}: there is no directory {path}.")
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{flag}: {path} has no config.json; it must be a Hugging Face model.")


def read_model_config(directory: str) -> dict[str, Any]:
    """config.json of --hf-checkpoint, or the text part of a multimodal one. Raises ConfigError for what is no JSON."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hf-checkpoint: {path} is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--hf-checkpoint: {path} must be a JSON object.")
    text: dict[str, Any] = config.get("text_config", config)
    return text


def experts_shape(config: dict[str, Any]) -> tuple[int, int] | None:
    """Layers, and experts of a token in each; None for a dense model."""
    layers, experts = config.get("num_hidden_layers"), config.get("num_experts_per_tok")
    return (layers, experts) if isinstance(layers, int) and isinstance(experts, int) else None


def context_length(config: dict[str, Any]) -> int | None:
    """Positions that the model was made for; None where config.json does not say."""
    length = config.get("max_position_embeddings")
    return length if isinstance(length, int) else None
