"""The optimizer state of experts goes on at another layout, whoever shares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import trained
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks

EXPERTS = {"expert_model_parallel_size": 2}
SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "sequence": SEQUENCE,
    "sequence_and_experts": {**SEQUENCE, **EXPERTS, "expert_tensor_parallel_size": 1},
    "pipeline": {"pipeline_model_parallel_size": 2},
}
WAYS: dict[str, dict[str, Any]] = {"distributed": {"use_distributed_optimizer": True}, "whole": {}}


def there_and_back(model: Path, work: Path) -> None:
    """With experts on two ranks, at another layout, with experts on two again; and without leaving them."""
    with megatron_on_cpu():
        for way, optimizer in WAYS.items():
            folder, experts = work / way, EXPERTS | optimizer
            whole = trained(model, folder / "experts", [0, 1, 2], parallel=experts)
            start: dict[str, Any] = {"load": str(folder / "experts"), "ckpt_step": 0, "first": 1}
            runs = {"new_optimizer": trained(model, folder / "x", [1], no_load_optim=True, parallel=experts, **start)}
            for name, layout in LAYOUTS.items():
                trained(model, folder / name, [1], parallel=layout | optimizer, **start)
                load = {"load": str(folder / name), "first": 2}
                runs[name] = trained(model, folder / "back", [2], parallel=experts, **load)
            if dist.get_rank() == 0:
                torch.save((whole, runs), folder / "runs.pt")


@pytest.mark.slow
def test_a_step_after_two_changes_of_layout_is_that_without(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "qwen3_moe")
    run_ranks(there_and_back, 2, model, tmp_path, store=tmp_path / "store")
    for way, optimizer in WAYS.items():
        whole, runs = torch.load(tmp_path / way / "runs.pt")
        for name in LAYOUTS:
            assert distance(runs[name], whole) < 1e-6, (way, name)
        assert distance(runs["new_optimizer"], whole) > 1e-4
        one = {"load": str(tmp_path / way / "data"), "first": 2, "parallel": optimizer}
        assert distance(trained(model, tmp_path / way / "one", [2], **one), whole) < 1e-6


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


def test_groups_and_steps_of_one_optimizer_become_those_of_two_and_back() -> None:
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    from slime.backends.megatron_utils.optimizer_state import complete, outline, tensors_in

    def part(names: list[str], step: dict[str, int]) -> dict[str, Any]:
        state = {number: {"exp_avg": ShardedObject(name, name, (1,), (0,))} for number, name in enumerate(names)}
        groups = [{"params": LocalNonpersistentObject([*state]), **step}]
        return {"optimizer": {"state": state, "param_groups": groups}, "grad_scaler": {"scale": len(names)}}

    one, two = part(["a", "b"], {"step": 7}), {0: part(["a"], {}), 1: part(["b"], {})}
    wanted = tensors_in(two)
    assert [*wanted[1]["optimizer"]] == ["state"]
    read = {number: {"optimizer": {"state": {0: {"exp_avg": name}}}} for number, name in enumerate("AB")}
    state = complete(outline(two), read | {"optimizer": {"param_groups": [{"step": 7}]}, "grad_scaler": {"scale": 9}})
    for number, name in enumerate("AB"):
        groups = [{"params": [0], "step": 7}]
        found = {"state": {0: {"exp_avg": name}}, "param_groups": groups}
        assert state[number] == {"optimizer": found, "grad_scaler": {"scale": 9}}
    saved = {number: {"optimizer": {"param_groups": [{"step": 8}]}} for number in range(2)}
    back = complete(outline(one), {"optimizer": {"state": {0: {"exp_avg": "A"}, 1: {"exp_avg": "B"}}}} | saved)
    groups = [{"params": [0, 1], "step": 8}]
    assert back["optimizer"] == {"state": {0: {"exp_avg": "A"}, 1: {"exp_avg": "B"}}, "param_groups": groups}
