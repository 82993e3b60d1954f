"""--optimizer-cpu-offload: moments on the host, updates as without it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import STEADY, equal, make_megatron, trained, two_rollouts
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks, settings_for

from slime.backends.megatron_utils import host_moments
from slime.backends.megatron_utils.adam import GroupStepAdamW

SIZES = [(3, 50), (1,), (700,), (16, 16), (17,), (2, 1000)]
OFFLOAD = {"optimizer_cpu_offload": True}
HALF = OFFLOAD | {"optimizer_offload_fraction": 0.5}
DISTRIBUTED = {"use_distributed_optimizer": True}
TORCH = {"ckpt_format": "torch"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True, **DISTRIBUTED},
    "data": DISTRIBUTED,
}
WAYS: list[dict[str, Any]] = [{}, DISTRIBUTED, TORCH, DISTRIBUTED | TORCH]


@pytest.fixture(autouse=True)
def small_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are cut by waves, and rooms used again."""
    monkeypatch.setattr(host_moments, "WAVE", 256)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]


def optimizer_of(params: list[torch.nn.Parameter], share: float) -> GroupStepAdamW:
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.1, "weight_decay": 0.0}]
    optimizer = GroupStepAdamW(groups, lr=0.01, weight_decay=0.1)
    if share > 0:
        optimizer.keep_on_host(share)
    return optimizer


def step(optimizer: GroupStepAdamW, seed: int, *, skipped: int = -1) -> None:
    """skipped: the number of a parameter without a gradient."""
    generator = torch.Generator().manual_seed(seed)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in enumerate(params):
        param.grad = None if number == skipped else torch.randn(param.shape, generator=generator)
    optimizer.step()


def moments_of(optimizer: GroupStepAdamW) -> list[torch.Tensor]:
    """In the order of parameters."""
    return [moment for _, state in sorted(optimizer.state_dict()["state"].items()) for moment in state.values()]


@pytest.mark.parametrize("share", [1.0, 0.6, 0.01])
def test_waves_update_as_whole_parameters_do(share: float) -> None:
    plain, offloaded = parameters(), parameters()
    optimizers = optimizer_of(plain, 0.0), optimizer_of(offloaded, share)
    for number in range(5):
        for optimizer in optimizers:
            step(optimizer, number, skipped=3 if number == 2 else -1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(offloaded, plain, strict=True))
    theirs, ours = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for number, state in theirs.items():
        assert all(torch.equal(moment, ours[number][name]) for name, moment in state.items())


def test_a_share_is_of_values_and_never_more() -> None:
    params = parameters()
    numels = {id(param): param.numel() for param in params}
    for share in (0.3, 0.7, 0.95, 1.0):
        held = sum(numels[id(param)] for param in host_moments.within(list(params), share))
        assert share - 0.06 < held / sum(numels.values()) <= share


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.5)])
def test_a_state_goes_on_wherever_its_moments_were(before: float, after: float) -> None:
    whole, params = parameters(), parameters()
    expected, first = optimizer_of(whole, 0.0), optimizer_of(params, before)
    step(expected, 0)
    step(first, 0)
    saved = first.state_dict()
    second = optimizer_of(params, after)
    on_host = [state for moments in second._moments for _, state in moments.states()]
    own = {moment.data_ptr() for state in on_host for moment in state.values()}
    second.load_state_dict(saved)
    assert own <= {value.data_ptr() for value in moments_of(second)}  # those on the host are where they were
    step(expected, 1)
    step(second, 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(params, whole, strict=True))


# --- as a backend's


def loaded(model: Path, settings: dict[str, Any] | None = None, **parallel: Any) -> Any:
    backend = make_megatron(settings_for(model, **STEADY | (settings or {})), **parallel)
    backend.load()
    return backend


def offloaded_of(backend: Any) -> float:
    """The share of moments that lies in the host's buffers."""
    from slime.backends.megatron_utils.optimizer import parts_of

    optimizers = [part.optimizer for part in parts_of(backend.optimizer)]
    buffers = [row.untyped_storage().data_ptr() for o in optimizers for group in o._moments for row in group._rows]
    moments = [moment for optimizer in optimizers for moment in moments_of(optimizer)]
    is_there = [moment.numel() * (moment.untyped_storage().data_ptr() in buffers) for moment in moments]
    return sum(is_there) / sum(moment.numel() for moment in moments)


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [
        ({}, {}),
        (DISTRIBUTED, {}),
        (DISTRIBUTED, {"bf16": True}),
        ({}, {"fp16": True, "initial_loss_scale": 1024.0}),
    ],
)
def test_a_backend_trains_as_without_it(parallel: dict[str, Any], precision: dict[str, Any], tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "qwen3_moe")
    settings = {"num_steps_per_rollout": 2, "weight_decay": 0.1, "reset_optimizer_states": True, **precision}
    runs, shares = [], []
    for offload in ({}, OFFLOAD, HALF):
        backend = loaded(model, settings, **parallel, **offload)
        runs.append(two_rollouts(backend, backend.run, tmp_path))
        shares.append(offloaded_of(backend))
    assert shares[:2] == [0, 1]
    assert 0.4 < shares[2] <= 0.5
    for run in runs[1:]:
        assert run.metrics == runs[0].metrics
        assert equal(run.weights, runs[0].weights)


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("before", "after", "parallel"),
    [
        *((OFFLOAD, OFFLOAD, parallel) for parallel in WAYS),
        *((OFFLOAD, HALF, parallel) for parallel in WAYS[:2]),
        *(({}, OFFLOAD, parallel) for parallel in (DISTRIBUTED, TORCH)),
        *((OFFLOAD, {}, parallel) for parallel in ({}, DISTRIBUTED | TORCH)),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    before: dict[str, Any], after: dict[str, Any], parallel: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"bf16": True, "async_save": True}
    whole = trained(model, tmp_path / "whole", [0, 1], parallel=parallel, bf16=True)
    trained(model, tmp_path / "parts", [0], parallel=parallel | before, **settings)
    written, expected = (num_bytes(tmp_path / name / "iter_0000000") for name in ("parts", "whole"))
    assert written == pytest.approx(expected, rel=0.02)  # not the memory around moments
    load = str(tmp_path / "parts")
    again = trained(model, tmp_path / "new", [1], first=1, load=load, parallel=parallel | after, **settings)
    assert equal(again, whole)


def test_it_is_ours_where_another_library_brings_adam(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from slime.backends.megatron_utils.optimizer import parts_of

    for module in (optimizer, distrib_optimizer):
        monkeypatch.setattr(module, "Adam", torch.optim.AdamW)
    for name, value in {"HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True, "USING_APEX_OPTIMIZER": False}.items():
        monkeypatch.setattr(distrib_optimizer, name, value)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    backend = loaded(model, **OFFLOAD, **DISTRIBUTED)
    assert [type(part.optimizer) for part in parts_of(backend.optimizer)] == [GroupStepAdamW]


def train_and_save(model: Path, work: Path) -> None:
    with megatron_on_cpu():
        host_moments.WAVE = 256
        settings: dict[str, Any] = {"load": str(work / "one"), "first": 1, "bf16": True}
        for name, parallel in LAYOUTS.items():
            plain = trained(model, work / f"plain_{name}", [1], parallel=parallel, **settings)
            ours = trained(model, work / f"ours_{name}", [1], parallel=parallel | OFFLOAD, **settings)
            if dist.get_rank() == 0:
                torch.save((plain, ours), work / f"{name}.pt")


@pytest.mark.slow
def test_a_checkpoint_is_read_at_another_parallelism(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path / "one", [0], parallel=OFFLOAD | DISTRIBUTED, bf16=True)
    run_ranks(train_and_save, 2, model, tmp_path, store=tmp_path / "store")
    for name in LAYOUTS:
        plain, ours = torch.load(tmp_path / f"{name}.pt")
        assert equal(ours, plain)
        folders = [str(tmp_path / f"{kind}_{name}") for kind in ("plain", "ours")]
        back = [loaded(model, {"load": folder, "bf16": True}, **OFFLOAD, **DISTRIBUTED) for folder in folders]
        theirs, mine = (moments_of(backend.optimizer.optimizer) for backend in back)
        assert all(torch.equal(moment, other) for moment, other in zip(mine, theirs, strict=True))
        assert max(moment.abs().max() for moment in mine) > 0
