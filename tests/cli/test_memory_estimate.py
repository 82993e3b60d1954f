"""The estimate against torch's own bookkeeping of saved tensors, and against peaks measured on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_families import write_tiny_model
from helpers.tiny_models import make_tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.random_checkpoint import SHAPES
from slime.backends.fsdp_utils import attention
from slime.backends.fsdp_utils.model import compile_each, decoder_layers, load_causal_lm
from slime.backends.shared.varlen import of_one_width
from slime.cli.dry_run import count
from slime.cli.memory_estimate import (
    Counts,
    ModelSize,
    TrainingLoad,
    asleep_bytes,
    kv_bytes_per_token,
    layer_activation_bytes,
    training_moments,
    training_peak,
)

GIB = 2**30
TOKENS = 256
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


class KernelForGPUs(torch.autograd.Function):
    """Keeps what the variable-length kernel keeps: queries, keys, values, result, log of the normaliser."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.zeros_like(query)
        ctx.save_for_backward(query, key, value, out, torch.zeros(query.shape[1:3]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


@pytest.fixture(autouse=True)
def attention_of_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def bucketed(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        result = KernelForGPUs.apply(*of_one_width(query, key, value))
        return result[..., : value.shape[-1]].transpose(1, 2)

    monkeypatch.setattr(attention, "_bucketed", bucketed)
    yield
    torch._dynamo.reset()


def saved_bytes(lm: Any) -> int:
    """What the layer in the middle keeps for its backward, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    marks: list[int] = []
    layer = decoder_layers(lm)[1]
    layer.register_forward_pre_hook(lambda *_: marks.append(len(seen)))
    layer.register_forward_hook(lambda *_: marks.append(len(seen)))
    packing = attention.Packing([TOKENS], torch.device("cpu"))
    inputs = {"input_ids": torch.arange(TOKENS)[None] % 300, "position_ids": torch.arange(TOKENS)[None]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = lm.model(**inputs, attention_mask=None, use_cache=False, packing=packing)
    assert output.last_hidden_state.requires_grad
    kept = list(seen.items())[marks[0] : marks[1]]
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept if pointer not in weights)


def tiny(folder: Path, architecture: str, dtype: torch.dtype, **overrides: Any) -> tuple[Any, ModelSize]:
    lm: Any = load_causal_lm(
        str(make_tiny_model(folder, architecture, **SHAPE, **overrides)), attn_implementation="packed"
    )
    lm = lm.to(dtype).eval()
    return lm, ModelSize.from_config(lm.config.to_dict(), count(lm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("architecture", "overrides"), [("qwen3", {"head_dim": 32}), ("qwen2", {}), ("llama", {}), ("qwen3_moe", {})]
)
def test_a_layer_keeps_what_the_derivation_says(
    tmp_path: Path, architecture: str, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    lm, size = tiny(tmp_path, architecture, dtype, **overrides)
    estimate = TOKENS * layer_activation_bytes(size, compute_bytes=dtype.itemsize, is_compiled=False)
    assert saved_bytes(lm) == pytest.approx(estimate, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("q_rank", [96, None])
def test_a_layer_of_latent_attention_keeps_what_the_derivation_says(
    tmp_path: Path, q_rank: int | None, dtype: torch.dtype
) -> None:
    latent = {"q_lora_rank": q_rank, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    shape = SHAPE | latent | {"v_head_dim": 16, "num_key_value_heads": 8, "first_k_dense_replace": 3}
    write_tiny_model("deepseek_v3", tmp_path / "model", vocab_size=320, **shape)
    lm: Any = load_causal_lm(str(tmp_path / "model"), attn_implementation="packed").to(dtype).eval()
    size = replace(ModelSize.from_config(lm.config.to_dict(), count(lm)), num_chosen=0)  # all layers are dense
    estimate = TOKENS * layer_activation_bytes(size, compute_bytes=dtype.itemsize, is_compiled=False)
    assert saved_bytes(lm) == pytest.approx(estimate, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "overrides"), [("qwen3", {"head_dim": 32}), ("qwen2", {})])
def test_a_compiled_layer_keeps_what_the_derivation_says(
    tmp_path: Path, architecture: str, overrides: dict[str, Any]
) -> None:
    lm, size = tiny(tmp_path, architecture, torch.bfloat16, **overrides)
    compile_each(decoder_layers(lm))
    estimate = TOKENS * layer_activation_bytes(size, compute_bytes=2, is_compiled=True)
    assert saved_bytes(lm) == pytest.approx(estimate, rel=1e-3)


def test_what_is_counted_in_a_model_is_what_it_has(tmp_path: Path) -> None:
    lm, size = tiny(tmp_path, "qwen3", torch.float32, head_dim=32, tie_word_embeddings=True)
    assert size.num_parameters == sum(parameter.numel() for parameter in lm.parameters())
    assert size.num_root == 320 * 128 + 128
    assert (size.num_norms, size.has_query_norms, size.num_layers) == (2, True, 3)
    other, _ = tiny(tmp_path / "llama", "llama", torch.float32)
    assert (count(other).num_norms, count(other).has_query_norms) == (2, False)
    assert count(other).num_root == 2 * 320 * 128 + 128


# --- against a GPU: benchmarks/gpu/results/train.txt, 16k tokens a micro-batch on one H200


def size_of(shape: str) -> ModelSize:
    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    return ModelSize.from_config(config.to_dict(), count(lm))


LOAD = TrainingLoad(num_ranks=1, micro_batch_tokens=16_384, logit_chunk_tokens=512, compute_bytes=2)


@pytest.mark.parametrize(
    ("shape", "recomputes", "is_compiled", "measured_gib"),
    [
        ("qwen3-0.6B", False, False, 41),
        ("qwen3-0.6B", True, False, 10),
        ("qwen3-0.6B", False, True, 30),
        ("qwen3-0.6B", True, True, 10),
        ("qwen3-4B", True, False, 64),
        ("qwen3-4B", False, True, 116),
        ("qwen3-4B", True, True, 63),
    ],
)
def test_peaks_of_training_are_those_of_the_gpu(
    shape: str, recomputes: bool, is_compiled: bool, measured_gib: int
) -> None:
    size, load = size_of(shape), replace(LOAD, recomputes=recomputes, is_compiled=is_compiled)
    peak = sum(training_peak(size, load).values())
    if not recomputes:  # keys and values were still repeated for each head when that was measured
        peak += size.num_layers * LOAD.micro_batch_tokens * 4 * size.head_width * (size.num_heads - size.num_kv_heads)
    assert peak / GIB == pytest.approx(measured_gib, rel=0.05)


def test_a_4b_trainer_that_sleeps_takes_the_host_memory_that_was_measured() -> None:
    assert asleep_bytes(size_of("qwen3-4B"), LOAD) / GIB == pytest.approx(45.3, rel=0.02)


# --- what follows


def test_states_are_shared_among_ranks_and_activations_are_not() -> None:
    size = size_of("qwen3-4B")
    one, eight = (training_moments(size, replace(LOAD, num_ranks=ranks))[0] for ranks in (1, 8))
    assert eight["weights and Adam"] == one["weights and Adam"] // 8
    assert eight["activations"] == one["activations"]


def test_further_models_and_micro_batches_take_their_share() -> None:
    size = size_of("qwen3-0.6B")
    more = training_moments(size, replace(LOAD, num_frozen=2, num_critic_ranks=2, accumulates=True))[0]
    plain = training_moments(size, LOAD)[0]
    assert more["frozen models"] == 2 * 4 * size.num_parameters
    assert more["critic"] == 12 * size.num_parameters // 2
    assert more["gradients"] - plain["gradients"] == 4 * size.num_parameters
    assert asleep_bytes(size, replace(LOAD, num_frozen=2)) == (12 + 8) * size.num_parameters


def test_what_lies_on_the_host_takes_no_memory_of_the_gpu() -> None:
    size = size_of("qwen3-0.6B")
    load = replace(LOAD, num_frozen=1, accumulates=True)
    loads = (load, replace(load, parks_frozen=True), replace(load, offloads_states=True))
    plain, parked, offloaded = (training_moments(size, each) for each in loads)
    for usual, without_frozen, without_states in zip(plain, parked, offloaded, strict=True):
        total = sum(usual.values())
        assert total - sum(without_frozen.values()) == 4 * size.num_parameters
        assert total - sum(without_states.values()) == (12 + 4 + 4) * size.num_parameters
    assert asleep_bytes(size, replace(load, offloads_states=True)) == asleep_bytes(size, load)


def test_weights_that_stay_gathered_are_there_when_the_backward_begins() -> None:
    size = size_of("qwen3-0.6B")
    begin, *later = training_moments(size, LOAD)
    more, *same = training_moments(size, replace(LOAD, keeps_layers=True))
    assert more["gathered"] - begin["gathered"] == 2 * (size.num_parameters - size.num_root - 2 * size.layer_parameters)
    assert later == same


def test_a_cache_holds_keys_and_values_of_each_layer() -> None:
    assert kv_bytes_per_token(size_of("qwen3-4B"), 2) == 2 * 36 * 8 * 128 * 2


def test_a_model_of_text_and_images_has_the_memory_of_its_text_part() -> None:
    config = AutoConfig.for_model(**SHAPES["qwen3-0.6B"]).to_dict()
    counts = Counts(600, 100, 2, has_query_norms=True)
    assert ModelSize.from_config({"text_config": config}, counts) == ModelSize.from_config(config, counts)


def test_a_cache_of_latent_attention_holds_what_the_engine_keeps() -> None:
    latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    config = AutoConfig.for_model(**SHAPES["qwen3-0.6B"]).to_dict() | latent
    size = ModelSize.from_config(config, Counts(1, 1, 1, has_query_norms=False))
    assert kv_bytes_per_token(size, 2, of_latents=True) == size.num_layers * (512 + 64) * 2
    assert kv_bytes_per_token(size, 2) == size.num_layers * 2 * size.num_kv_heads * (128 + 64) * 2
    with pytest.raises(KeyError, match="v_head_dim"):
        ModelSize.from_config({name: config[name] for name in config if name != "v_head_dim"}, Counts(1, 1, 1, True))
