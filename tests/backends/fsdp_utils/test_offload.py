"""What waits on the host. That it leaves a GPU is tested in tests/e2e/gpu/test_fsdp_features.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.training import full_weights, make_backend, random_batch, run_ranks, settings_for
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import LossOutput, TokenOutputs, Wants
from slime.utils.distributed import communication

STEADY = {"adam_eps": 1e-4, "lr": 1e-3, "clip_grad": 0.01}


def loaded(model: Path, **settings: Any) -> FSDPBackend:
    backend = make_backend(settings_for(model, **STEADY | settings))
    backend.load()
    return backend


def my_batch(seed: int = 0) -> PackedBatch:
    batch = random_batch(seed=seed)
    rows = range(dist.get_rank(), len(batch), dist.get_world_size())
    return pack_rows(batch, rows, batch.loss_mask / batch.loss_mask.sum())


def likelihood(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: Any) -> LossOutput:
    loss = -(batch.loss_weights * outputs.log_probs).sum()
    return LossOutput(loss, {"loss": loss.detach()})


def after_steps(backend: FSDPBackend, num_steps: int = 3) -> dict[str, torch.Tensor]:
    """Weights after some steps, log-probs and a nap before each."""
    for seed in range(num_steps):
        backend.sleep()
        backend.wake_up()
        backend.log_probs([my_batch(seed)], "actor", entropy=False)
        backend.train_step([my_batch(seed), my_batch(seed + 1)], likelihood, wants=Wants())
    return full_weights(backend)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "settings",
    [{"fsdp_cpu_offload": True}, {"fsdp_reshard_after_forward": False}, {"offload_ref": True, "use_kl_loss": True}],
)
def test_where_weights_wait_changes_nothing(model: Path, settings: dict[str, Any]) -> None:
    assert same(after_steps(loaded(model, **settings)), after_steps(loaded(model)))


def test_offloading_is_what_fsdp_is_told(model: Path) -> None:
    backend = loaded(model, fsdp_cpu_offload=True, use_kl_loss=True)
    for tag in ("actor", "ref"):
        groups = [m for m in backend.models[tag].modules() if isinstance(m, FSDPModule)]  # type: ignore[index]
        assert len(groups) == 3
        for group in groups:
            assert isinstance(group._get_fsdp_state()._fsdp_param_group.offload_policy, CPUOffloadPolicy)


def test_weights_that_stay_gathered_are_freed_after_log_probs(model: Path) -> None:
    backend = loaded(model, fsdp_reshard_after_forward=False)
    backend.log_probs([my_batch()], "actor", entropy=False)
    states = [m._get_fsdp_state() for m in backend.models["actor"].modules() if isinstance(m, FSDPModule)]
    assert len(states) == 3
    assert all(state._fsdp_param_group.is_sharded for state in states)


def test_an_offloaded_critic_trains(model: Path) -> None:
    args = settings_for(model, fsdp_cpu_offload=True, advantage_estimator="ppo", **STEADY)
    backend = FSDPBackend(args, args, torch.device("cpu"), role="critic")
    backend.load()

    def squares(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: Any) -> LossOutput:
        assert outputs.values is not None
        return LossOutput((batch.loss_weights * (outputs.values - 1) ** 2).sum(), {})

    losses = [backend.train_step([my_batch()], squares, wants=Wants()).metrics["loss"] for _ in range(3)]
    assert losses[2] < losses[0]


def two_ranks(model: Path, folder: Path) -> None:
    settings = {"actor_num_gpus_per_node": 2, "fsdp_cpu_offload": True}
    backend = loaded(model, **settings, save=str(folder / "save"))
    ours, plain = after_steps(backend), after_steps(loaded(model, actor_num_gpus_per_node=2))
    backend.save(2)
    again = loaded(model, **settings, load=str(folder / "save"))
    if dist.get_rank() == 0:
        torch.save([ours, plain], folder / "weights.pt")
    resumed, uninterrupted = after_steps(again, 1), after_steps(backend, 1)
    if dist.get_rank() == 0:
        torch.save([resumed, uninterrupted], folder / "resumed.pt")


def test_two_offloaded_ranks_train_clip_save_and_resume_as_others_do(model: Path, tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, model, tmp_path, store=tmp_path / "store")
    assert same(*torch.load(tmp_path / "weights.pt"))
    assert same(*torch.load(tmp_path / "resumed.pt"))


def test_tensors_on_the_host_have_a_backend_of_their_own() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert communication("auto", gpu) == "nccl"
    assert communication("auto", cpu) == communication("auto", cpu, cpu_backend="gloo") == "gloo"
    assert communication("auto", gpu, cpu_backend="gloo") == "cpu:gloo,cuda:nccl"
    assert communication("gloo", gpu, cpu_backend="mpi") == "cpu:mpi,cuda:gloo"
