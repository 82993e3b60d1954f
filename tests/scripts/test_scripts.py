"""Every script's flags fit each other and the model, on a machine without a GPU: what it says is checked, not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_tiny_model, make_tokenizer
from safetensors.torch import save_file
from transformers import AutoConfig

from scripts.random_checkpoint import SHAPES

ROOT = Path(__file__).resolve().parents[2]
HERE = ("--rollout-engine", "embedded", "--rollout-num-gpus-per-engine", "1", "--device", "cpu")
WITH_MEGATRON = ("--custom-megatron-init-path", "builtins.id")


def make_tiny_qwen(path: Path) -> Path:
    return make_tiny_model(path, max_position_embeddings=32768)


def make_published_shape(path: Path) -> Path:
    """DeepSeek-V3's config.json, whose numbers model arguments are compared with, and one of its tensors."""
    AutoConfig.for_model(**SHAPES["deepseek-v3"]).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    save_file({"model.norm.weight": torch.ones(7168)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("run-*.sh")), ids=lambda path: path.stem)
def test_a_script_passes_the_dry_run(path: Path, tmp_path: Path) -> None:
    model = make_published_shape(tmp_path / "model") if "deepseek" in path.stem else make_tiny_qwen(tmp_path / "model")
    row = {"prompt": [{"role": "user", "content": "1 + 1"}], "label": "2"}
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps(row) + "\n") * 32)
    names = {"MODEL": model, "DATA": data, "EVAL_DATA": data, "OUTPUT": tmp_path / "out", "PYTHON": sys.executable}
    environment = os.environ | {name: str(value) for name, value in names.items()}
    environment.pop("WANDB_API_KEY", None)
    result = subprocess.run(
        ["bash", path, "--dry-run", *HERE, *(WITH_MEGATRON if path.stem.endswith("megatron") else ())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_script_can_be_sourced_and_leaves_the_shell_as_it_was(tmp_path: Path) -> None:
    script = f"cd {tmp_path}; PYTHON=false; source {ROOT}/scripts/run-qwen3-4B-fsdp.sh; pwd; false; echo alive $-"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.split()[:2] == [str(tmp_path), "alive"]
    assert "e" not in result.stdout.split()[2] and "u" not in result.stdout.split()[2]
