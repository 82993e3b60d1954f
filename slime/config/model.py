"""What config.json says of a model, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

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


class ExpertsShape(NamedTuple):
    """Layers of a mixture of experts, experts of a token in each, and experts in all."""

    num_layers: int
    top_k: int
    num_experts: int


def experts_shape(config: dict[str, Any]) -> ExpertsShape | None:
    """None for a dense model."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    num_experts = next((config[name] for name in names if config.get(name)), None)
    num_layers, top_k = config.get("num_hidden_layers"), config.get("num_experts_per_tok")
    if not (isinstance(num_layers, int) and isinstance(top_k, int) and isinstance(num_experts, int)):
        return None
    return ExpertsShape(num_layers, top_k, num_experts)


def context_length(config: dict[str, Any]) -> int | None:
    """Positions that the model was made for; None where config.json does not say."""
    length = config.get("max_position_embeddings")
    return length if isinstance(length, int) else None
