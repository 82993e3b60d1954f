"""Checkpoints of Megatron's older format, a file a rank; what they share with torch_dist is in test_checkpoint.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import Weights, equal, trained
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks
from safetensors.torch import load_file

from slime.backends.megatron_utils.convert import megatron_to_hf

TORCH = {"ckpt_format": "torch"}
DISTRIBUTED = {"use_distributed_optimizer": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "distributed_optimizer": DISTRIBUTED,
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2, **DISTRIBUTED},
    "context": {"context_parallel_size": 2},
}
VIRTUAL: dict[str, Any] = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
EXPERTS: dict[str, Any] = {"expert_model_parallel_size": 2, **DISTRIBUTED}
FOLDERS = {
    "data": {"mp_rank_00"},
    "distributed_optimizer": {"mp_rank_00"},
    "tensor": {"mp_rank_00", "mp_rank_01"},
    "pipeline": {"mp_rank_00_000", "mp_rank_00_001"},
    "context": {"mp_rank_00"},
    "virtual": {"mp_rank_00_000", "mp_rank_00_001"},
    "experts": {"mp_rank_00_000", "mp_rank_00_001"},
}


def test_both_formats_are_read_whatever_is_written(model: Path, tmp_path: Path) -> None:
    whole = trained(model, tmp_path / "whole", [0, 1])
    trained(model, tmp_path / "parts", [0], parallel=TORCH)
    load: dict[str, Any] = {"load": str(tmp_path / "parts")}
    trained(model, tmp_path / "parts", [1], first=1, **load)  # read as torch, written as torch_dist
    assert equal(trained(model, tmp_path / "new", [], first=2, parallel=TORCH, **load), whole)


def test_files_are_those_that_conversion_reads_and_hold_nothing_else(model: Path, tmp_path: Path) -> None:
    parallel = TORCH | DISTRIBUTED
    weights = trained(model, tmp_path / "save", [0], parallel=parallel)
    files = {path.name: path for path in (tmp_path / "save" / "iter_0000000" / "mp_rank_00").iterdir()}
    assert set(files) == {"model_optim_rng.pt", "distrib_optim.pt"}
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    assert files["model_optim_rng.pt"].stat().st_size < 1.2 * num_bytes + 1e5  # not the memory around its tensors
    assert files["distrib_optim.pt"].stat().st_size < 1.2 * 3 * num_bytes + 1e5
    state = torch.load(files["model_optim_rng.pt"], weights_only=True)
    assert (state["iteration"], state["checkpoint_version"]) == (0, 3.0)
    megatron_to_hf(tmp_path / "save", tmp_path / "hf", origin=model)
    written: Weights = {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        written |= load_file(path)
    assert equal({name: written[name] for name in weights}, weights)


def test_a_torch_checkpoint_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path / "save", [0], parallel=TORCH)
    wider = make_tiny_model(tmp_path / "wider", intermediate_size=160)
    with pytest.raises(ValueError, match="cannot be read at this layout, or is of another model") as failure:
        trained(wider, tmp_path / "new", [], load=str(tmp_path / "save"))
    assert len(str(failure.value).splitlines()) == 1


def save_and_go_on(name: str, parallel: dict[str, Any], model: Path, work: Path) -> None:
    save = work / name
    whole = trained(model, work / f"whole_{name}", [0, 1], parallel=parallel | TORCH)
    before = trained(model, save, [0], parallel=parallel | TORCH, async_save=True)
    after = trained(model, work / f"after_{name}", [1], first=1, load=str(save), parallel=parallel)
    if dist.get_rank() == 0:
        torch.save((before, whole, after), work / f"{name}.pt")


def read_elsewhere(model: Path, work: Path) -> None:
    """What two tensor-parallel ranks saved, by two stages; its optimizer is refused."""
    stages = {"parallel": LAYOUTS["pipeline"], "load": str(work / "tensor")}
    weights = trained(model, work / "stages", [], finetune=True, **stages)
    with pytest.raises(ValueError, match=r"mp_rank_00, mp_rank_01 is read at that layout alone. Pass --no-load-optim"):
        trained(model, work / "stages", [], **stages)
    if dist.get_rank() == 0:
        torch.save(weights, work / "stages.pt")


def two_ranks(model: Path, moe: Path, work: Path) -> None:
    with megatron_on_cpu():
        for name, parallel in LAYOUTS.items():
            save_and_go_on(name, parallel, model, work)
        save_and_go_on("virtual", VIRTUAL, model, work)
        save_and_go_on("experts", EXPERTS, moe, work)
        read_elsewhere(model, work)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("runs")
    model = make_tiny_model(work / "model", num_hidden_layers=4, vocab_size=321)  # two ranks pad the vocabulary
    moe = make_tiny_model(work / "moe", "qwen3_moe")
    run_ranks(two_ranks, 2, model, moe, work, store=work / "store")
    return work


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, "virtual", "experts"])
def test_two_ranks_go_on_bit_for_bit(layout: str, runs: Path) -> None:
    _, whole, after = torch.load(runs / f"{layout}.pt")
    assert equal(after, whole)
    found = {path.name for path in (runs / layout / "iter_0000000").glob("mp_rank_*")}
    assert found == FOLDERS[layout]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_read_at_another_layout(layout: str, runs: Path, tmp_path: Path) -> None:
    before, _, _ = torch.load(runs / f"{layout}.pt")
    alone = trained(runs / "model", tmp_path, [], load=str(runs / layout), finetune=True)
    assert equal(alone, before)
    if layout == "tensor":
        assert equal(torch.load(runs / "stages.pt"), before)


@pytest.mark.slow
def test_experts_and_virtual_stages_of_two_ranks_are_not_read_by_one(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="virtual pipeline stages are read from the torch_dist format only"):
        trained(runs / "model", tmp_path, [], load=str(runs / "virtual"), finetune=True)
    with pytest.raises(ValueError, match="Where experts are split among ranks, save in the torch_dist format"):
        trained(runs / "moe", tmp_path, [], load=str(runs / "experts"), finetune=True)
