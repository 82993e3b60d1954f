"""A run that is interrupted and resumed equals one that is not; weights are read at any parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import equal, trained
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks
from transformers import AutoModelForCausalLM

DISTRIBUTED = {"use_distributed_optimizer": True}
MOVING_REFERENCE: dict[str, Any] = {"use_kl_loss": True, "kl_loss_coef": 0.1, "ref_update_interval": 1}
TORCH = {"ckpt_format": "torch"}
WAYS: list[dict[str, Any]] = [{}, DISTRIBUTED, TORCH, DISTRIBUTED | TORCH]
LAYOUTS: list[dict[str, Any]] = [
    {"tensor_model_parallel_size": 2, "sequence_parallel": True, **DISTRIBUTED},
    {"pipeline_model_parallel_size": 2, **DISTRIBUTED},
    {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, **DISTRIBUTED},
    DISTRIBUTED,
]


@pytest.mark.parametrize("parallel", WAYS)
def test_resumed_equals_uninterrupted_bit_for_bit(parallel: dict[str, Any], model: Path, tmp_path: Path) -> None:
    whole = trained(model, tmp_path / "whole", [0, 1], parallel=parallel)
    trained(model, tmp_path / "parts", [0], parallel=parallel)
    load = str(tmp_path / "parts")
    assert equal(trained(model, tmp_path / "parts", [1], first=1, load=load, parallel=parallel), whole)
    assert (tmp_path / "parts" / "latest_checkpointed_iteration.txt").read_text() == "1"
    again = trained(model, tmp_path / "other", [1], first=1, load=load, ckpt_step=0, parallel=parallel)
    assert equal(again, whole)


@pytest.mark.parametrize("parallel", [{}, TORCH])
def test_a_step_without_an_optimizer_is_loaded_without_it(
    parallel: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    before = trained(model, tmp_path, [0], no_save_optim=True, parallel=parallel)
    load = {"load": str(tmp_path), "first": 1}
    assert equal(trained(model, tmp_path / "new", [], no_load_optim=True, **load), before)
    with pytest.raises(ValueError, match="holds no optimizer such as this run"):
        trained(model, tmp_path / "new", [], **load)


@pytest.mark.parametrize("parallel", [{}, TORCH])
def test_where_weights_come_from(parallel: dict[str, Any], model: Path, other_model: Path, tmp_path: Path) -> None:
    saved = trained(model, tmp_path / "saved", [0], parallel=parallel)
    empty, checkpoint = str(tmp_path / "empty"), str(tmp_path / "saved")
    assert equal(trained(other_model, tmp_path / "new", [], load=empty, ref_load=checkpoint), saved)
    assert equal(trained(other_model, tmp_path / "new", [], load=checkpoint, finetune=True), saved)
    assert not equal(trained(other_model, tmp_path / "new", [], load=empty), saved)
    with pytest.raises(ValueError, match="there is no complete checkpoint .*iter_0000007; present: iter_0000000"):
        trained(model, tmp_path / "new", [], load=checkpoint, ckpt_step=7)


@pytest.mark.parametrize("way", [{}, {"parallel": TORCH}, {"async_save": True}])
def test_a_reference_that_moved_is_kept(way: dict[str, Any], model: Path, tmp_path: Path) -> None:
    settings = MOVING_REFERENCE | way
    whole = trained(model, tmp_path / "whole", [0, 1], **settings)
    trained(model, tmp_path / "parts", [0], **settings)
    load = str(tmp_path / "parts")
    assert equal(trained(model, tmp_path / "parts", [1], first=1, load=load, **MOVING_REFERENCE), whole)


def test_a_directory_for_transformers_is_written_with_each_save(model: Path, tmp_path: Path) -> None:
    ours = trained(model, tmp_path / "save", [0], save_hf=str(tmp_path / "hf_{rollout_id}"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf_0").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def load_and_save_by_two(model: Path, work: Path) -> None:
    with megatron_on_cpu():
        for number, parallel in enumerate(LAYOUTS):
            settings = {"load": str(work / "one"), "first": 1, "parallel": parallel, **MOVING_REFERENCE}
            read = trained(model, work / f"two_{number}", [], **settings)
            written = trained(model, work / f"two_{number}", [1], **settings)
            if dist.get_rank() == 0:
                torch.save((read, written), work / f"two_{number}.pt")


@pytest.mark.slow
def test_a_checkpoint_is_read_at_another_parallelism(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=4)
    one = trained(model, tmp_path / "one", [0], parallel=DISTRIBUTED, **MOVING_REFERENCE)
    load: dict[str, Any] = {"load": str(tmp_path / "one"), "parallel": DISTRIBUTED, **MOVING_REFERENCE}
    next_of_one = trained(model, tmp_path / "next", [1], first=1, **load)
    run_ranks(load_and_save_by_two, 2, model, tmp_path, store=tmp_path / "store")
    for number in range(len(LAYOUTS)):
        read, written = torch.load(tmp_path / f"two_{number}.pt")
        assert equal(read, one)
        for name, tensor in written.items():
            torch.testing.assert_close(tensor, next_of_one[name], rtol=0, atol=1e-5)
        load["load"] = str(tmp_path / f"two_{number}")
        back = trained(model, tmp_path / "back", [], first=2, **load)
        assert equal(back, written)
