"""Models read without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slime.cli.memory_estimate import ModelSize, TrainingLoad, kv_bytes_per_token, trainer_memory
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


def test_memory_of_a_trainer_is_16_bytes_a_parameter_shared_by_the_ranks() -> None:
    config = {
        "num_hidden_layers": 4,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 10,
    }
    model = ModelSize.from_config(config, 1000)
    load = TrainingLoad(
        num_ranks=2, micro_batch_tokens=5, logit_chunk_tokens=3, compute_bytes=2, num_frozen=1, recomputes=True
    )
    memory = trainer_memory(model, load)
    assert memory["weights, gradients, Adam"] == 500 * 16
    assert memory["frozen models"] == 500 * 4
    assert memory["logits"] == 2 * 3 * 10 * 4
    assert memory["activations"] == 5 * 8 * 2 * (4 + 17)
    assert kv_bytes_per_token(model, 2) == 2 * 4 * (2 * 2) * 2
