"""What a Hugging Face directory says of its model, read without torch: config.json and the headers of its weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.config import ConfigError
from slime.config.model import context_length, read_model_config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_LONGEST_HEADER = 100 * 2**20  # safetensors' own limit


@dataclass(frozen=True)
class ModelFiles:
    """config: config.json, or the text part of a multimodal one. shapes: of the tensors in safetensors files."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    num_bytes: int

    @property
    def context_length(self) -> int | None:
        """Positions that the model was made for; None where config.json does not say."""
        return context_length(self.config)


def read_model_files(directory: str) -> ModelFiles:
    """The model in `directory`. Raises ConfigError, naming file and tensor, where one is missing or does not fit."""
    folder = Path(directory)
    config = read_model_config(directory)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"--hf-checkpoint: {directory} has no tokenizer (tokenizer.json and the like).")
    weights = sorted(folder.glob("*.safetensors"))
    others = [path for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern)]
    if not weights and not others:
        raise ConfigError(f"--hf-checkpoint: {directory} has no weights (*.safetensors or *.bin).")
    shapes = {name: shape for path in weights for name, shape in _read_shapes(path)}
    _check_shapes(directory, config, shapes)
    return ModelFiles(config, shapes, sum(path.stat().st_size for path in weights or others))


def _read_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a safetensors file: eight bytes of length, then a JSON header."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        text = file.read(length) if 0 < length <= _LONGEST_HEADER else b""
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hf-checkpoint: {path} is not a complete safetensors file; copy it again.") from error
    last_byte = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if path.stat().st_size != 8 + length + last_byte:
        raise ConfigError(f"--hf-checkpoint: {path} is cut off or changed: its size is not what its header says.")
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, tuple(entry["shape"])


def _check_shapes(directory: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """The tensors that nearly every decoder has must have the shapes that config.json asks for; trainers check all."""
    wanted_of = dict(_wanted_shapes(config))
    for name, shape in shapes.items():
        wanted = next((wanted for suffix, wanted in wanted_of.items() if name.endswith(suffix)), None)
        if wanted is not None and wanted != shape:
            raise ConfigError(
                f"--hf-checkpoint: {directory}: tensor {name} has shape {shape}, its config.json asks for {wanted}."
            )


def _wanted_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    vocabulary, width = config.get("vocab_size"), config.get("hidden_size")
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    if isinstance(width, int) and isinstance(vocabulary, int):
        yield "model.embed_tokens.weight", (vocabulary, width)
    if isinstance(width, int) and isinstance(heads, int):
        head_dim = head_dim if isinstance(head_dim, int) else width // heads
        if config.get("model_type") in ("qwen2", "qwen3", "llama", "mistral"):
            yield ".self_attn.o_proj.weight", (width, heads * head_dim)
            if isinstance(config.get("intermediate_size"), int):
                yield ".mlp.down_proj.weight", (width, config["intermediate_size"])
