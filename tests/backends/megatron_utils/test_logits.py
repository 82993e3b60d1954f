from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_models import build_gpt, load_hf, logits_of, megatron_world
from helpers.model_families import CONFIGS, write_tiny_model

from slime.backends.megatron_utils.names import HFDirectory, read_shape


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
