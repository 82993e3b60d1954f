from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plain_grpo
from helpers.tiny_models import make_tiny_model
from helpers.training import random_samples
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from slime.backends.fsdp_utils.model import TokenModel, checkpoint_dtype, decoder_layers, load_causal_lm
from slime.data.batch import batch_from_samples
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import Wants
from slime.utils.types import Sample

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "qwen3_moe": {},
    "deepseek_v3": {},  # values narrower than keys
    "qwen3 tied": {"tie_word_embeddings": True},
    "qwen2 sliding window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models"), request.param.split()[0], **MODELS[request.param])


def token_model(
    directory: Path, *, temperature: float = 1.0, chunk_size: int = 7, attn_implementation: str = "packed"
) -> TokenModel:
    lm = load_causal_lm(str(directory), attn_implementation=attn_implementation).eval()
    return TokenModel(lm, temperature=temperature, chunk_size=chunk_size)


def packed(samples: list[Sample]) -> PackedBatch:
    batch = batch_from_samples(samples, [0.0] * len(samples))
    return pack_rows(batch, range(len(batch)), batch.loss_mask)


@pytest.mark.parametrize(("temperature", "chunk_size"), [(1.0, 7), (0.6, 1), (1.7, 1000)])
def test_log_probs_and_entropy_equal_those_of_each_sequence_alone(
    directory: Path, temperature: float, chunk_size: int
) -> None:
    samples = random_samples()
    model = token_model(directory, temperature=temperature, chunk_size=chunk_size)
    plain = plain_grpo.load(directory)
    with torch.no_grad():
        ours = model(packed(samples), Wants(entropy=True))
        log_probs = torch.cat([plain_grpo.response_log_probs(plain, sample, temperature) for sample in samples])
        entropy = torch.cat([plain_grpo.response_entropy(plain, sample, temperature) for sample in samples])
    torch.testing.assert_close(ours.log_probs.double(), log_probs, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.entropy.double(), entropy, rtol=0, atol=2e-5)
    assert ours.log_probs.dtype == torch.float32


def test_gradients_equal_those_of_each_sequence_alone(directory: Path) -> None:
    samples = random_samples()
    batch = packed(samples)
    weights = torch.linspace(-1, 1, len(batch.target_index))
    model = token_model(directory, temperature=0.8)
    outputs = model(batch, Wants(entropy=True))
    ((outputs.log_probs + 0.1 * outputs.entropy) * weights).sum().backward()
    plain = plain_grpo.load(directory)
    log_probs = torch.cat([plain_grpo.response_log_probs(plain, sample, 0.8) for sample in samples])
    entropy = torch.cat([plain_grpo.response_entropy(plain, sample, 0.8) for sample in samples])
    ((log_probs + 0.1 * entropy) * weights.double()).sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.lm.named_parameters():
        reference = expected[name].grad
        assert (parameter.grad.double() - reference).norm() < 1e-4 * max(float(reference.norm()), 1e-2), name


def test_changing_one_sequence_leaves_the_others_bit_for_bit(directory: Path) -> None:
    # Experts run on all their tokens at once: a matrix product of another size may round in another way.
    is_moe = "num_experts" in (directory / "config.json").read_text()
    samples = random_samples()
    batch = packed(samples)
    model = token_model(directory)
    changed = 3
    start = sum(len(sample.tokens) for sample in samples[:changed])
    with torch.no_grad():
        before = model(batch, Wants()).log_probs
        batch.input_ids[start : start + len(samples[changed].tokens)] = 5
        after = model(batch, Wants()).log_probs
    untouched = batch.sequence_ids != changed
    torch.testing.assert_close(before[untouched], after[untouched], rtol=0, atol=1e-6 if is_moe else 0)
    assert not torch.equal(before[~untouched], after[~untouched])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_attention_of_transformers_keeps_packed_sequences_apart_too(directory: Path, attn_implementation: str) -> None:
    batch = packed(random_samples())
    with torch.no_grad():
        ours = token_model(directory)(batch, Wants()).log_probs
        theirs = token_model(directory, attn_implementation=attn_implementation)(batch, Wants()).log_probs
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


class LargestFloat32(TorchDispatchMode):
    """Remembers the number of elements of the largest float32 tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                self.largest = max(self.largest, leaf.numel())
        return result


@pytest.mark.parametrize("with_gradient", [False, True])
def test_logits_are_held_for_one_chunk_of_tokens_at_a_time(tmp_path: Path, with_gradient: bool) -> None:
    vocab_size, num_tokens, chunk_size = 20_000, 150, 10
    directory = make_tiny_model(tmp_path, vocab_size=vocab_size, hidden_size=8, intermediate_size=8)
    samples = [Sample(group_index=0, tokens=[1] * (num_tokens + 1), response_length=num_tokens)]
    model = token_model(directory, chunk_size=chunk_size)
    batch = packed(samples)
    with LargestFloat32() as seen, torch.set_grad_enabled(with_gradient):
        outputs = model(batch, Wants(entropy=True))
        if with_gradient:
            (outputs.log_probs.sum() + outputs.entropy.sum()).backward()
    assert chunk_size * vocab_size <= seen.largest < 2 * chunk_size * vocab_size < num_tokens * vocab_size


def test_saved_for_the_backward_is_no_table_of_logits(tmp_path: Path) -> None:
    vocab_size, num_tokens = 20_000, 150
    directory = make_tiny_model(tmp_path, vocab_size=vocab_size, hidden_size=8, intermediate_size=8)
    model = token_model(directory, chunk_size=10)
    batch = packed([Sample(group_index=0, tokens=[1] * (num_tokens + 1), response_length=num_tokens)])
    sizes: list[int] = []
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch, Wants(entropy=True))
    assert sum(sizes) < num_tokens * vocab_size / 10


def test_the_decoder_layers_are_found(directory: Path) -> None:
    assert len(decoder_layers(load_causal_lm(str(directory), attn_implementation="packed"))) == 2


def test_a_directory_that_is_not_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"the model in {tmp_path} cannot be loaded"):
        load_causal_lm(str(tmp_path), attn_implementation="packed")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(
        ValueError, match=r"down_proj.weight has shape \(64, 128\), its config.json asks for \(64, 96\)"
    ):
        load_causal_lm(str(directory), attn_implementation="packed")


def test_a_config_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    config = make_tiny_model(tmp_path) / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    for read in (checkpoint_dtype, lambda path: load_causal_lm(path, attn_implementation="packed")):
        with pytest.raises(ValueError, match=f"the model in {tmp_path} cannot be loaded: (?s:.*)num_hidden_layers"):
            read(str(tmp_path))


def test_a_truncated_weight_file_is_named(tmp_path: Path) -> None:
    weights = make_tiny_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"the model in {tmp_path} cannot be loaded"):
        load_causal_lm(str(tmp_path), attn_implementation="packed")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path)
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are missing, first model\.norm\.weight"):
        load_causal_lm(str(directory), attn_implementation="packed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_of_a_checkpoint_is_that_of_its_config(tmp_path: Path, dtype: str) -> None:
    assert checkpoint_dtype(str(make_tiny_model(tmp_path, dtype=dtype))) == getattr(torch, dtype)


def test_models_that_scale_their_logits_are_refused(tmp_path: Path) -> None:
    lm = load_causal_lm(str(make_tiny_model(tmp_path)), attn_implementation="packed")
    lm.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="scales its logits"):
        TokenModel(lm, temperature=1.0, chunk_size=8)


def test_one_response_token_is_enough(tmp_path: Path) -> None:
    model = token_model(make_tiny_model(tmp_path))
    samples = [Sample(group_index=0, tokens=[3, 9], response_length=1)]
    with torch.no_grad():
        outputs = model(packed(samples), Wants(entropy=True))
    assert outputs.log_probs.shape == outputs.entropy.shape == (1,)
    assert np.isfinite(outputs.log_probs.item())
