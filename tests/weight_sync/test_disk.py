from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from slime.weight_sync import disk
from slime.weight_sync.disk import DiskTransport, write_hf_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "model")


def tensors_of(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def stored(directory: Path) -> dict[str, Tensor]:
    """All shards together; each tensor must be where the index says."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards.keys()
    tensors = {name: shards[shard][name] for name, shard in index["weight_map"].items()}
    assert sum(map(len, shards.values())) == len(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("shard_bytes", [1, 50_000, 2**30])
def test_what_is_written_is_what_was_given_in_shards_of_the_size_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(disk, "SHARD_BYTES", shard_bytes)
    write_hf_directory(tensors_of(model).items(), tmp_path / "out", assets=str(model), is_writer=True)
    assert same(stored(tmp_path / "out"), tensors_of(model))
    for path in (tmp_path / "out").glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(path).values()]
        assert len(sizes) == 1 or sum(sizes) <= shard_bytes
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_tokenizer_and_config_come_along_and_old_weights_do_not(model: Path, tmp_path: Path) -> None:
    write_hf_directory(tensors_of(model).items(), tmp_path / "out", assets=str(model), is_writer=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert "model.safetensors" not in names
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def full_disk(model: Path) -> Iterator[tuple[str, Tensor]]:
    for index, pair in enumerate(tensors_of(model).items()):
        if index == 3:
            raise OSError(28, "No space left on device")
        yield pair


@pytest.mark.parametrize("is_durable", [False, True])
def test_a_disk_that_fills_leaves_nothing_or_what_was_there(model: Path, tmp_path: Path, is_durable: bool) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        write_hf_directory(full_disk(model), out, assets=str(model), is_writer=True, is_durable=is_durable)
    assert list(tmp_path.iterdir()) == []
    write_hf_directory(tensors_of(model).items(), out, assets=str(model), is_writer=True, is_durable=is_durable)
    with pytest.raises(OSError, match="No space left"):
        write_hf_directory(full_disk(model), out, assets=str(model), is_writer=True, is_durable=is_durable)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert same(stored(out), tensors_of(model))


def test_ranks_that_do_not_write_still_take_part_in_gathering(model: Path, tmp_path: Path) -> None:
    taken: list[str] = []
    pairs = ((taken.append(name), (name, tensor))[1] for name, tensor in tensors_of(model).items())
    write_hf_directory(pairs, tmp_path / "out", assets=str(model), is_writer=False)
    assert taken == list(tensors_of(model))
    assert list(tmp_path.iterdir()) == []


def test_versions_lie_side_by_side_until_they_are_deleted(model: Path, tmp_path: Path) -> None:
    transport = DiskTransport(tmp_path, assets=str(model), is_writer=True)
    paths = [transport.write(tensors_of(model).items(), version) for version in (9, 10, 11)]
    assert [path.name for path in paths] == ["v000009", "v000010", "v000011"]
    transport.delete_before(11)
    assert [path.name for path in tmp_path.iterdir()] == ["v000011"]
    assert same(stored(transport.path_of(11)), tensors_of(model))


def test_versions_that_are_kept_are_not_deleted(model: Path, tmp_path: Path) -> None:
    transport = DiskTransport(tmp_path, assets=str(model), is_writer=True, keep=True)
    for version in (1, 2):
        transport.send(tensors_of(model).items(), [], version, timeout_s=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000001", "v000002"]
