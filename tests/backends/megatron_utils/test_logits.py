from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_models import build_gpt, load_hf, logits_of, megatron_world
from helpers.megatron_training import make_megatron
from helpers.model_families import CONFIGS, write_tiny_model
from helpers.training import random_batch, settings_for

from slime.backends.megatron_utils.names import HFDirectory, read_shape
from slime.data.packed import pack_rows

YARN = CONFIGS["deepseek_v3"]["rope_parameters"]
PUBLISHED_ROPE = {"type": "yarn"} | {name: YARN[name] for name in YARN if not name.startswith("rope")}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_megatron_model_has_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    """float32; names, layouts and the arguments derived from config.json all have to be right for this."""
    hf = write_tiny_model(family, tmp_path)
    shape = read_shape(tmp_path)
    tokens = torch.randint(0, shape.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hf(tokens).logits
    with megatron_on_cpu(), megatron_world(), torch.no_grad():
        model = build_gpt(shape)
        load_hf(model, shape, HFDirectory(tmp_path))
        found = logits_of(model, tokens)[..., : shape.vocab_size]
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"q_lora_rank": None},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}},
        {"rope_parameters": {name: YARN[name] for name in YARN if not name.startswith("mscale")}},
        {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "n_shared_experts": 2},
        {"num_experts_per_tok": 1, "n_group": 1, "norm_topk_prob": False},
        {"first_k_dense_replace": 4},
        {"v_head_dim": 20},  # as wide as keys
        {"rope_parameters": None, "rope_theta": 5e4, "rope_scaling": PUBLISHED_ROPE, "num_nextn_predict_layers": 1},
    ],
)
def test_further_shapes_of_deepseek_have_the_log_probs_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    """Packed sequences on slime's own attention, against transformers on each sequence by itself."""
    hf = write_tiny_model("deepseek_v3", tmp_path, vocab_size=64, initializer_range=0.2, **fields)
    args = settings_for(tmp_path)
    batch = random_batch(seed=5, vocab_size=64)
    weights = torch.ones(int(batch.response_lengths.sum())).numpy()
    expected = []
    for row in range(len(batch)):
        alone = pack_rows(batch, [row], weights)
        with torch.no_grad():
            log_probs = hf(alone.input_ids[None]).logits[0].log_softmax(-1)
        expected.append(log_probs[alone.target_index - 1, alone.targets])
    backend = make_megatron(args)
    backend.load()
    packed = pack_rows(batch, range(len(batch)), weights)
    found = backend.log_probs([packed], "actor", entropy=False)[0].log_probs
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
