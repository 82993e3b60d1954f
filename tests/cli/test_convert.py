from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.model_families import write_tiny_model
from safetensors import safe_open

from slime.backends.megatron_utils.convert.torch_dist_file import TorchDistReader
from slime.backends.megatron_utils.model_arguments import as_flags, facts
from slime.backends.megatron_utils.names import read_shape
from slime.cli.convert import main, main_hf_to_torch_dist, main_torch_dist_to_hf

ROOT = Path(__file__).parents[2]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    (path,) = directory.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same(first: Path, second: Path) -> bool:
    a, b = tensors_of(first), tensors_of(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_documented_tools_convert_there_and_back_without_megatron(tmp_path: Path) -> None:
    """As scripts, from another folder, with a megatron that must not be imported in front of the real one."""
    write_tiny_model("qwen3", tmp_path / "hf")
    (tmp_path / "trap/megatron").mkdir(parents=True)
    (tmp_path / "trap/megatron/__init__.py").write_text("raise SystemExit('megatron was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "trap")}

    def run(tool: str, *words: str) -> None:
        command = [sys.executable, str(ROOT / "tools" / tool), *words]
        subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, check=True, capture_output=True)

    model_args = as_flags(facts(read_shape(tmp_path / "hf")))
    run("convert_hf_to_torch_dist.py", *model_args, "--hf-checkpoint", "hf", "--save", "megatron")
    run(
        "convert_torch_dist_to_hf.py",
        *("--input-dir", "megatron/release", "--output-dir", "back", "--origin-hf-dir", "hf"),
    )
    assert same(tmp_path / "hf", tmp_path / "back")


def test_slime_convert_finds_the_direction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model("llama", tmp_path / "hf")
    hf, megatron, back = (str(tmp_path / name) for name in ("hf", "megatron", "back"))
    assert main([hf, megatron]) == 0
    assert main([megatron, back, "--origin-hf-dir", hf]) == 0
    assert same(tmp_path / "hf", tmp_path / "back")
    assert capsys.readouterr().out == f"{megatron}\n{back}\n"
    with pytest.raises(SystemExit):
        main([megatron, str(tmp_path / "other")])
    assert "--origin-hf-dir is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["nowhere", "new"], ["hf", "new", "--origin-hf-dir", "nowhere"], ["nowhere", "new", "--origin-hf-dir", "hf"]],
)
def test_a_directory_that_is_not_there_is_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().err.rstrip().endswith("there is no directory nowhere")


def test_model_arguments_that_differ_from_config_json_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model("llama", tmp_path / "hf")
    words = as_flags(facts(read_shape(tmp_path / "hf")))
    words[words.index("--rotary-base") + 1] = "10000"
    code = main_hf_to_torch_dist([*words, "--hf-checkpoint", str(tmp_path / "hf"), "--save", str(tmp_path / "out")])
    assert code == 1
    assert "error: --rotary-base: the model arguments say 10000, config.json says 500000." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_list_of_layers_with_experts_gives_keys_layer_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Megatron-core asks for them then."""
    write_tiny_model("qwen3_moe", tmp_path / "hf")
    words = [*as_flags(facts(read_shape(tmp_path / "hf"))), "--moe-layer-freq", "([1]*4)", "--moe-permute-fusion"]
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), *words]) == 0
    assert capsys.readouterr().err == "without effect here: --moe-permute-fusion\n"
    reader = TorchDistReader(tmp_path / "out/release")
    assert reader.shapes["decoder.layers.3.mlp.experts.experts.linear_fc1.weight"] == (4, 48, 32)
    assert main([str(tmp_path / "out"), str(tmp_path / "back"), "--origin-hf-dir", str(tmp_path / "hf")]) == 0
    assert same(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize(
    ("tracker", "message"),
    [(None, "holds neither a torch_dist checkpoint"), ("12", "iter_0000012 does not exist"), ("x", "must hold a step")],
)
def test_a_folder_without_a_checkpoint_is_refused_in_one_sentence(
    tracker: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model("llama", tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    if tracker is not None:
        (tmp_path / "empty/latest_checkpointed_iteration.txt").write_text(tracker)
    words = ["--input-dir", str(tmp_path / "empty"), "--output-dir", str(tmp_path / "out")]
    assert main_torch_dist_to_hf([*words, "--origin-hf-dir", str(tmp_path / "hf")]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
