from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.megatron_models import build_gpt, load_hf, megatron_world
from helpers.model_families import CONFIGS, write_tiny_model

from slime.backends.megatron_utils.convert import hf_to_torch_dist, megatron_to_hf
from slime.backends.megatron_utils.names import HFDirectory, read_shape

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", CONFIGS)
def test_transformer_engine_layers_load_what_was_converted_and_save_what_comes_back(
    family: str, tmp_path: Path
) -> None:
    """Fused norms, grouped experts, `_extra_state`: Transformer Engine's names, at Megatron's own strictness."""
    pytest.importorskip("transformer_engine.pytorch")
    from megatron.core import dist_checkpointing

    write_tiny_model(family, tmp_path / "hf", dtype=torch.bfloat16)
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "megatron")
    shape = read_shape(tmp_path / "hf")
    with megatron_world():
        options = {"dtype": torch.bfloat16, "transformer_engine": True, "moe_grouped_gemm": shape.moe is not None}
        model, expected = (build_gpt(shape, **options) for _ in range(2))
        load_hf(expected, shape, HFDirectory(tmp_path / "hf"), transformer_engine=True)
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(tmp_path / "megatron/release"))
        model.load_state_dict(loaded["model"])
        for name, tensor in expected.state_dict().items():
            assert name.endswith("_extra_state") or torch.equal(model.state_dict()[name], tensor), name
        folder = tmp_path / "iter_0000001"
        folder.mkdir()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder))
    megatron_to_hf(folder, tmp_path / "back", origin=tmp_path / "hf")
    source, back = HFDirectory(tmp_path / "hf"), HFDirectory(tmp_path / "back")
    assert source.shapes == back.shapes
    assert all(torch.equal(source.tensor(name), back.tensor(name)) for name in source.shapes)
