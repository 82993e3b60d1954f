"""Layers for multi-token prediction are in every file that is written, as they were, and are sent to no engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.megatron_training import make_megatron
from helpers.model_families import write_tiny_model_with_mtp
from helpers.training import make_backend, make_recipe, random_batch, settings_for
from torch import Tensor
from transformers import AutoModelForCausalLM

from slime.backends.megatron_utils.convert import hf_to_torch_dist, megatron_to_hf
from slime.backends.megatron_utils.names import HFDirectory, NameMapError, check_checkpoint, passed_through, read_shape
from slime.engine.embedded.weights import ModelWeights
from slime.utils.checksum import tensor_checksum
from slime.weight_sync.check import check_files
from slime.weight_sync.disk import DiskTransport

SHAPES = [("deepseek_v3", 1), ("deepseek_v3", 2), ("glm4_moe", 1)]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, set[str]]:
    """A model as published, and the names of the tensors that nobody trains."""
    family, number = request.param
    return tmp_path / "hf", write_tiny_model_with_mtp(family, tmp_path / "hf", num_mtp_layers=number, vocab_size=320)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Of all files; none holds what another holds."""
    source = HFDirectory(directory)
    return {name: source.tensor(name) for name in source.shapes}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], names: set[str]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in names)


def test_each_of_their_tensors_is_accounted_for(published: tuple[Path, set[str]]) -> None:
    model, names = published
    shape, found = read_shape(model), HFDirectory(model).shapes
    check_checkpoint(shape, found)
    assert set(passed_through(shape, found)) == names
    config = json.loads((model / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(NameMapError, match=r"tensor model.layers.4.* of the checkpoint is in no table of"):
        check_checkpoint(read_shape(model), found)


@pytest.mark.parametrize("trainer", ["megatron", "fsdp"])
def test_a_trained_model_is_saved_with_them(trainer: str, published: tuple[Path, set[str]], tmp_path: Path) -> None:
    model, names = published
    args = settings_for(model, save=str(tmp_path / "save"), save_hf=str(tmp_path / "out"))
    backend = make_megatron(args) if trainer == "megatron" else make_backend(args)
    backend.load()
    make_recipe(backend, args, tmp_path).train(0, random_batch())  # type: ignore[arg-type]
    backend.save(0)
    backend.finish_save()
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert same(before, after, names)
    trained = dict(backend.hf_tensors())
    assert trained.keys() == before.keys() - names
    assert same(trained, after, set(trained))
    assert not same(before, after, set(trained))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_conversion_brings_them_back(published: tuple[Path, set[str]], tmp_path: Path) -> None:
    """From what `slime convert` wrote, and from what a run that loaded it saved."""
    model, names = published
    hf_to_torch_dist(model, tmp_path / "converted")
    backend = make_megatron(settings_for(model, load=str(tmp_path / "converted"), save=str(tmp_path / "saved")))
    backend.load()
    backend.save(0)
    before = tensors_of(model)
    for folder in ("converted", "saved"):
        megatron_to_hf(tmp_path / folder, tmp_path / f"{folder}_back", origin=model)
        after = tensors_of(tmp_path / f"{folder}_back")
        assert before.keys() == after.keys() > names
        assert same(before, after, set(before))


@pytest.mark.parametrize("trainer", ["megatron", "fsdp"])
def test_weight_sync_sends_the_others_once_and_leaves_them_in_files(
    trainer: str, published: tuple[Path, set[str]], tmp_path: Path
) -> None:
    model, names = published
    args = settings_for(model)
    backend = make_megatron(args) if trainer == "megatron" else make_backend(args)
    backend.load()
    before = tensors_of(model)
    assert Counter(name for name, _ in backend.hf_tensors()) == Counter(before.keys() - names)
    files = DiskTransport(tmp_path / "weights", assets=str(model), is_writer=True)
    written = files.write(backend.hf_tensors(), 1)
    after = tensors_of(written)
    assert before.keys() == after.keys()
    assert same(before, after, set(before))
    sent = {name: tensor_checksum(tensor) for name, tensor in backend.hf_tensors()}
    check_files(written, sent)
    engine = ModelWeights(AutoModelForCausalLM.from_pretrained(model), str(model))
    engine.load_from_disk(str(written))
    assert engine.checksums() == sent
