from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_models import build_gpt, load_hf, logits_of, megatron_world
from helpers.model_families import CONFIGS, write_tiny_model

from slime.backends.megatron_utils.names import FAMILIES, HFDirectory, all_parameters, check_checkpoint, read_shape

PAGE = Path(__file__).parents[3] / "docs" / "add-a-model.md"


def test_the_family_of_the_page_is_short_and_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are those of transformers, its joined tensors those of the checkpoint."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) < 40
    module: dict[str, Any] = {}
    exec(code, module)
    monkeypatch.setitem(FAMILIES, "phi3", module["FAMILY"])
    monkeypatch.setitem(CONFIGS, "phi3", {"model_type": "phi3", "sliding_window": None})
    hf = write_tiny_model("phi3", tmp_path)
    shape, source = read_shape(tmp_path), HFDirectory(tmp_path)
    check_checkpoint(shape, source.shapes)
    assert len(list(all_parameters(shape))) == 3 + 6 * shape.num_layers
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        expected = hf(tokens).logits
    with megatron_on_cpu(), megatron_world(), torch.no_grad():
        model = build_gpt(shape)
        load_hf(model, shape, source)
        torch.testing.assert_close(logits_of(model, tokens)[..., :250], expected, rtol=1e-4, atol=1e-5)
