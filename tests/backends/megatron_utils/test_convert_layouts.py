"""Converted checkpoints at other parallel layouts of the real megatron-core: two processes, gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_models import build_gpt, load_hf, megatron_world
from helpers.model_families import write_tiny_model
from helpers.training import run_ranks

from slime.backends.megatron_utils.convert import hf_to_torch_dist, megatron_to_hf
from slime.backends.megatron_utils.names import HFDirectory, read_shape

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
}
FAMILIES = {"llama-tied": ("tp2", "pp2"), "qwen3_moe": ("tp2", "ep2", "pp2"), "deepseek_v3": ("tp2", "ep2", "pp2")}


@pytest.mark.slow
def test_every_layout_loads_what_was_converted_and_what_it_saves_comes_back(tmp_path: Path) -> None:
    """Both formats; the torch format's files of expert-parallel ranks are not read."""
    for family in FAMILIES:
        write_tiny_model(family, tmp_path / family / "hf", dtype=torch.bfloat16)
        hf_to_torch_dist(tmp_path / family / "hf", tmp_path / family / "megatron")
    run_ranks(_load_and_save_at_each_layout, 2, str(tmp_path), store=tmp_path / "store")
    for family, layouts in FAMILIES.items():
        source = HFDirectory(tmp_path / family / "hf")
        saved = [f"{layout}_torch_dist" for layout in layouts] + [
            f"{layout}_torch" for layout in layouts if layout != "ep2"
        ]
        for name in saved:
            back = tmp_path / family / f"{name}_back"
            megatron_to_hf(tmp_path / family / name, back, origin=tmp_path / family / "hf")
            found = HFDirectory(back)
            assert found.shapes == source.shapes
            assert all(torch.equal(found.tensor(name), source.tensor(name)) for name in source.shapes)


def _load_and_save_at_each_layout(root: str) -> None:
    with megatron_on_cpu():
        for family, layouts in FAMILIES.items():
            for layout in layouts:
                with megatron_world(**LAYOUTS[layout]):
                    _load_and_save(Path(root) / family, layout)
                dist.barrier()


def _load_and_save(folder: Path, layout: str) -> None:
    from megatron.core import dist_checkpointing

    shape = read_shape(folder / "hf")
    model, expected = (build_gpt(shape, dtype=torch.bfloat16) for _ in range(2))
    load_hf(expected, shape, HFDirectory(folder / "hf"))
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "megatron/release"))
    model.load_state_dict(loaded["model"])
    for name, tensor in expected.state_dict().items():
        assert name.endswith("_extra_state") or torch.equal(model.state_dict()[name], tensor), name
    sharded = folder / f"{layout}_torch_dist"
    sharded.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(sharded))
    name = {"tp2": f"mp_rank_{dist.get_rank():02d}", "pp2": f"mp_rank_00_{dist.get_rank():03d}"}.get(layout)
    if name is not None:
        path = folder / f"{layout}_torch" / name
        path.mkdir(parents=True)
        torch.save({"model": model.state_dict(), "checkpoint_version": 3.0}, path / "model_optim_rng.pt")
