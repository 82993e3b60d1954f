from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import make_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slime.backends.fsdp_utils.hf_names import hf_named_tensors
from slime.backends.fsdp_utils.model import load_causal_lm
from slime.weight_sync.disk import write_hf_directory

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "qwen3_moe": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "qwen3 bfloat16": {"dtype": "bfloat16"},
    "qwen3_moe bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", request.param.split()[0], **MODELS[request.param])


@pytest.mark.parametrize("bucket_bytes", [1, 40_000, 2**30])
def test_tensors_equal_those_of_the_checkpoint_bit_for_bit(directory: Path, bucket_bytes: int) -> None:
    stored = load_file(directory / "model.safetensors")
    dtype = next(iter(stored.values())).dtype
    lm = load_causal_lm(str(directory), attn_implementation="packed")
    pairs = list(hf_named_tensors(lm, dtype=dtype, bucket_bytes=bucket_bytes))
    ours = dict(pairs)
    assert len(pairs) == len(ours), "each name once"
    assert ours.keys() == stored.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == stored[name].dtype, name
        assert torch.equal(tensor, stored[name]), name


def test_experts_are_split_as_checkpoints_hold_them(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, "qwen3_moe")
    lm = load_causal_lm(str(directory), attn_implementation="packed")
    names = {name for name, _ in hf_named_tensors(lm, dtype=torch.float32, bucket_bytes=1)}
    experts = {name for name in names if "experts.3." in name and "layers.1." in name}
    prefix = "model.layers.1.mlp.experts.3."
    assert experts == {f"{prefix}{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")}


def test_a_tied_head_is_sent_once(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, tie_word_embeddings=True)
    lm = load_causal_lm(str(directory), attn_implementation="packed")
    names = [name for name, _ in hf_named_tensors(lm, dtype=torch.float32, bucket_bytes=2**30)]
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_what_is_written_loads_with_transformers_and_says_the_same(directory: Path, tmp_path: Path) -> None:
    lm = load_causal_lm(str(directory), attn_implementation="packed")
    dtype = next(iter(load_file(directory / "model.safetensors").values())).dtype
    tensors = hf_named_tensors(lm, dtype=dtype, bucket_bytes=30_000)
    write_hf_directory(tensors, tmp_path / "out", assets=str(directory), is_writer=True)
    tokens = torch.tensor([[5, 8, 13, 21]])
    original, written = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (directory, tmp_path / "out")
    )
    assert torch.equal(original, written)
