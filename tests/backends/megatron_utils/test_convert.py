from __future__ import annotations

import shutil
from argparse import Namespace
from collections import namedtuple
from enum import Enum
from pathlib import Path

import pytest
import torch
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_models import build_gpt, load_hf, megatron_world
from helpers.model_families import CONFIGS, edit_weights, write_tiny_model

from slime.backends.megatron_utils.convert import hf_to_torch_dist, megatron_to_hf
from slime.backends.megatron_utils.convert.torch_dist_file import TorchDistReader
from slime.backends.megatron_utils.names import HFDirectory, NameMapError, read_shape


def same_tensors(first: Path, second: Path) -> bool:
    a, b = HFDirectory(first), HFDirectory(second)
    return a.shapes == b.shapes and all(
        a.dtypes[name] == b.dtypes[name] and torch.equal(a.tensor(name), b.tensor(name)) for name in a.shapes
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_a_round_trip_through_torch_dist_keeps_every_bit(family: str, tmp_path: Path) -> None:
    write_tiny_model(family, tmp_path / "hf", dtype=torch.bfloat16)
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "release"
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", origin=tmp_path / "hf")
    assert same_tensors(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back/config.json").read_text() == (tmp_path / "hf/config.json").read_text()


@pytest.mark.parametrize("family", CONFIGS)
def test_megatron_core_loads_what_was_converted(family: str, tmp_path: Path) -> None:
    """Megatron's own loader, its own keys and shapes; every parameter then equals what the name map makes of HF."""
    write_tiny_model(family, tmp_path / "hf", dtype=torch.bfloat16)
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    shape = read_shape(tmp_path / "hf")
    with megatron_on_cpu(), megatron_world():
        from megatron.core import dist_checkpointing

        model, expected = (build_gpt(shape, dtype=torch.bfloat16) for _ in range(2))
        load_hf(expected, shape, HFDirectory(tmp_path / "hf"))
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(tmp_path / "megatron/release"))
        model.load_state_dict(loaded["model"])
        assert loaded["checkpoint_version"] == 3.0
        for name, tensor in expected.state_dict().items():
            if not name.endswith("_extra_state"):
                assert torch.equal(model.state_dict()[name], tensor), name


def test_what_megatron_core_saves_is_converted_bit_for_bit(tmp_path: Path) -> None:
    write_tiny_model("qwen3_moe", tmp_path / "hf", dtype=torch.bfloat16)
    shape = read_shape(tmp_path / "hf")
    with megatron_on_cpu(), megatron_world():
        from megatron.core import dist_checkpointing

        model = build_gpt(shape, dtype=torch.bfloat16)
        load_hf(model, shape, HFDirectory(tmp_path / "hf"))
        folder = tmp_path / "megatron/iter_0000007"
        folder.mkdir(parents=True)
        dist_checkpointing.save({"model": model.sharded_state_dict(), "iteration": 7}, str(folder))
    (tmp_path / "megatron/latest_checkpointed_iteration.txt").write_text("7")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", origin=tmp_path / "hf")
    assert same_tensors(tmp_path / "hf", tmp_path / "back")


class Backend(Enum):
    LOCAL = 1


Settings = namedtuple("Settings", "names")


@pytest.mark.parametrize("family", ["qwen2-tied", "glm4_moe", "deepseek_v3"])
def test_the_older_torch_format_is_converted_without_running_its_pickled_classes(family: str, tmp_path: Path) -> None:
    write_tiny_model(family, tmp_path / "hf", dtype=torch.bfloat16)
    shape = read_shape(tmp_path / "hf")
    with megatron_on_cpu(), megatron_world():
        model = build_gpt(shape, dtype=torch.bfloat16)
        load_hf(model, shape, HFDirectory(tmp_path / "hf"))
        folder = tmp_path / "iter_0000003/mp_rank_00"
        folder.mkdir(parents=True)
        arguments = Namespace(attention_backend=Backend.LOCAL, settings=Settings([1]), path=tmp_path)
        state = {"model": model.state_dict(), "args": arguments, "rng_state": [torch.get_rng_state()]}
        torch.save(state, folder / "model_optim_rng.pt")
    megatron_to_hf(tmp_path / "iter_0000003", tmp_path / "back", origin=tmp_path / "hf")
    assert same_tensors(tmp_path / "hf", tmp_path / "back")


def test_a_stored_copy_of_tied_weights_must_be_one_and_is_written_again(tmp_path: Path) -> None:
    model = write_tiny_model("qwen2-tied", tmp_path / "hf")
    edit_weights(tmp_path / "hf", add={"lm_head.weight": model.model.embed_tokens.weight.detach().clone()})
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", origin=tmp_path / "hf")
    assert same_tensors(tmp_path / "hf", tmp_path / "back")
    edit_weights(tmp_path / "hf", add={"lm_head.weight": torch.zeros(250, 32)})
    with pytest.raises(NameMapError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf_to_torch_dist(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize(
    ("add", "remove", "message"),
    [
        ({}, "model.layers.2.mlp.up_proj.weight", "tensor model.layers.2.mlp.up_proj.weight is missing"),
        ({"model.extra": torch.zeros(2)}, None, "tensor model.extra of the checkpoint is in no table of llama"),
        ({"model.norm.weight": torch.zeros(31)}, None, r"model.norm.weight has shape \(31,\), config.json asks for"),
        ({"model.norm.weight": torch.zeros(32).byte()}, None, "tensor model.norm.weight is stored as U8"),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32).half()},
            None,
            "decoder.layers.0.mlp.linear_fc1.weight is made of tensors of several dtypes",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_nothing(
    add: dict[str, torch.Tensor], remove: str | None, message: str, tmp_path: Path
) -> None:
    write_tiny_model("llama", tmp_path / "hf")
    edit_weights(tmp_path / "hf", add=add, remove=remove)
    with pytest.raises(NameMapError, match=message):
        hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_a_conversion_that_fails_midway_leaves_no_checkpoint(tmp_path: Path) -> None:
    write_tiny_model("llama", tmp_path / "hf")

    def fails(name: str) -> None:
        if "layers.3" in name:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron", progress=fails)
    assert list((tmp_path / "megatron").iterdir()) == []
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(OSError, match="No space left"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", origin=tmp_path / "hf", progress=fails)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_existing_results_are_not_overwritten(tmp_path: Path) -> None:
    write_tiny_model("llama", tmp_path / "hf")
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(FileExistsError, match="is not empty"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", origin=tmp_path / "hf")


def test_room_on_the_disk_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model("llama", tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="0.0 GiB free"):
        hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    assert list((tmp_path / "megatron").iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused_naming_the_tensor(tmp_path: Path) -> None:
    write_tiny_model("qwen2", tmp_path / "qwen2")
    write_tiny_model("qwen3", tmp_path / "qwen3")
    write_tiny_model("llama", tmp_path / "small", intermediate_size=32)
    write_tiny_model("llama", tmp_path / "large")
    hf_to_torch_dist(tmp_path / "qwen2", tmp_path / "megatron")
    with pytest.raises(NameMapError, match="parameter decoder.layers.0.self_attention.q_layernorm.weight is missing"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", origin=tmp_path / "qwen3")
    with pytest.raises(NameMapError, match="tensor decoder.layers.self_attention.linear_qkv.bias of the checkpoint is"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", origin=tmp_path / "large")
    hf_to_torch_dist(tmp_path / "small", tmp_path / "other")
    with pytest.raises(NameMapError, match=r"linear_fc1.weight has shape \(4, 64, 32\), config.json asks for \(4, 96"):
        megatron_to_hf(tmp_path / "other", tmp_path / "back", origin=tmp_path / "large")
    assert not (tmp_path / "back").exists()


def test_the_vocabulary_is_padded_with_zeros_to_megatrons_multiple(tmp_path: Path) -> None:
    model = write_tiny_model("llama", tmp_path / "hf")
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    reader = TorchDistReader(tmp_path / "megatron/release")
    assert reader.shapes["output_layer.weight"] == (256, 32)
    stored = reader.read("output_layer.weight", (0, 0), (256, 32))
    assert torch.equal(stored[:250], model.lm_head.weight) and not stored[250:].any()
