"""Weights under checkpoint names: complete, strict, in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from slime.engine.embedded.weights import ModelWeights, WeightsRefused
from slime.utils.checksum import tensor_checksum

KINDS = {
    "qwen3": ("qwen3", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}


@pytest.fixture(scope="module", params=KINDS)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape."""
    architecture, fields = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    first, second = (make_tiny_model(root / str(seed), architecture, seed=seed, **fields) for seed in range(2))
    return first, second


@pytest.fixture
def weights(checkpoints: tuple[Path, Path]) -> Iterator[ModelWeights]:
    """The first checkpoint's weights, loaded."""
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(checkpoints[0]).requires_grad_(False)
        yield ModelWeights(model, str(checkpoints[0]))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_holds(weights: ModelWeights, folder: Path) -> None:
    """The weights are those of a checkpoint, by every name in it, and the model computes with them."""
    held = dict(weights.named_tensors())
    expected = tensors_of(folder)
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in expected)
    tokens = torch.arange(4, 20)[None]
    reference = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert torch.equal(weights._model(tokens).logits, reference)


def test_names_and_shapes_are_the_checkpoints(weights: ModelWeights, checkpoints: tuple[Path, Path]) -> None:
    assert {name: tensor.shape for name, tensor in tensors_of(checkpoints[0]).items()} == weights.shapes


def test_a_checkpoint_on_disk_replaces_all(weights: ModelWeights, checkpoints: tuple[Path, Path]) -> None:
    pointers = [parameter.data_ptr() for parameter in weights._model.parameters()]
    weights.load_from_disk(str(checkpoints[1]))
    assert_holds(weights, checkpoints[1])
    assert [parameter.data_ptr() for parameter in weights._model.parameters()] == pointers


def test_tensors_may_come_one_by_one_in_any_order(weights: ModelWeights, checkpoints: tuple[Path, Path]) -> None:
    for name, tensor in reversed(tensors_of(checkpoints[1]).items()):
        weights.check({name: tensor.shape}, origin="test", complete=False)
        weights.load([(name, tensor)])
    assert weights.reason_unusable() is None
    assert_holds(weights, checkpoints[1])


def test_checksums_are_those_of_the_checkpoint(weights: ModelWeights, checkpoints: tuple[Path, Path]) -> None:
    expected = {name: tensor_checksum(tensor) for name, tensor in tensors_of(checkpoints[0]).items()}
    assert weights.checksums() == expected


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    weights: ModelWeights, checkpoints: tuple[Path, Path], tmp_path: Path, fault: str
) -> None:
    tensors = tensors_of(checkpoints[1])
    last = sorted(tensors)[-1]
    if fault == "missing":
        del tensors[last]
        expected = f"tensor '{last}' is missing"
    elif fault == "unknown":
        tensors["model.extra"] = torch.zeros(1)
        expected = "the model has no tensor 'model.extra'"
    else:
        tensors[last] = torch.zeros(3)
        expected = rf"tensor '{last}' has shape \[3\], the model's is"
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsRefused, match=expected):
        weights.load_from_disk(str(tmp_path))
    assert_holds(weights, checkpoints[0])


def test_released_weights_take_no_memory_and_are_read_again_when_needed(
    weights: ModelWeights, checkpoints: tuple[Path, Path]
) -> None:
    weights.release()
    assert sum(parameter.numel() for parameter in weights._model.parameters()) == 0
    assert "released" in (weights.reason_unusable() or "")
    weights.resume()
    assert weights.reason_unusable() is None
    weights.ensure_loaded()
    assert_holds(weights, checkpoints[0])


def test_released_weights_that_came_from_no_disk_must_be_sent_again(
    weights: ModelWeights, checkpoints: tuple[Path, Path]
) -> None:
    tensors = list(tensors_of(checkpoints[1]).items())
    weights.load(tensors[:1])
    weights.release()
    weights.resume()
    assert "not sent since" in (weights.reason_unusable() or "")
    weights.load(tensors[:-1])
    assert weights.reason_unusable() is not None
    weights.load(tensors[-1:])
    assert weights.reason_unusable() is None
    assert_holds(weights, checkpoints[1])


def test_half_an_expert_layer_cannot_be_served(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "moe", "qwen3_moe")
    with torch.inference_mode():
        weights = ModelWeights(AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False), str(folder))
        experts = [(name, tensor) for name, tensor in tensors_of(folder).items() if "experts.0.gate_proj" in name]
        weights.load(experts)
    assert "incomplete" in (weights.reason_unusable() or "")


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    weights = ModelWeights(AutoModelForCausalLM.from_pretrained(tiny_model), str(tiny_model))
    with pytest.raises(WeightsRefused, match="holds no safetensors file"):
        weights.load_from_disk(str(tmp_path))
    with pytest.raises(WeightsRefused, match="is not a folder"):
        weights.load_from_disk(str(tmp_path / "none"))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(WeightsRefused, match="cannot be read"):
        weights.load_from_disk(str(tmp_path))
