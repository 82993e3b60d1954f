"""Models read without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slime.cli.model_files import read_model_files
from slime.config import ConfigError
from tests.helpers.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_shapes_and_bytes_are_those_of_the_checkpoint(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture)
    files = read_model_files(str(folder))
    assert files.shapes["model.embed_tokens.weight"] == (320, 64)
    assert files.context_length == 2048
    assert files.num_bytes == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("setting", "tensor"),
    [({"hidden_size": 32}, "embed_tokens"), ({"vocab_size": 300}, "embed_tokens"), ({"head_dim": 8}, "o_proj")],
)
def test_a_config_that_does_not_fit_names_the_tensor(model: Path, setting: dict[str, int], tensor: str) -> None:
    config = json.loads((model / "config.json").read_text()) | setting
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=tensor):
        read_model_files(str(model))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda m: (m / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda m: (m / "config.json").write_text("[]"), "must be a JSON object"),
        (lambda m: (m / "model.safetensors").unlink(), "no weights"),
        (lambda m: (m / "model.safetensors").write_bytes(b"12345"), "not a complete safetensors file"),
        (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64), "not a complete safetensors file"),
        (lambda m: [p.unlink() for p in m.glob("*token*")], "no tokenizer"),
    ],
)
def test_damage_is_named(model: Path, damage: object, says: str) -> None:
    assert callable(damage)
    damage(model)
    with pytest.raises(ConfigError, match=says):
        read_model_files(str(model))
