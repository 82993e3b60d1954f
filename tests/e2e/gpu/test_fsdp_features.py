"""The FSDP backend's features on a GPU; what they compute is tested on a CPU."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slime.observability.profile import MemoryHistory
from slime.training.plan import everything
from slime.utils.distributed import communication, init_process_group
from slime.utils.http_utils import find_free_port
from tests.e2e.gpu.test_fsdp_backend import build, rollout, settings
from tests.helpers.tiny_models import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def mixed_world() -> Iterator[None]:
    """A world of one rank in which tensors on the host can be added up too."""
    init_process_group(
        backend=communication("auto", torch.device("cuda", 0), cpu_backend="gloo"),
        rank=0,
        world_size=1,
        address=f"127.0.0.1:{find_free_port()}",
        timeout_minutes=2,
    )
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 whose heads the kernel takes."""
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(path, hidden_size=256, head_dim=64, initializer_range=0.02)
    return path


def test_float16_trains_near_float32(mixed_world: None, model: Path, tmp_path: Path) -> None:
    _, half = build(settings(model, "--fp16"), tmp_path)
    _, full = build(settings(model, "--no-bf16"), tmp_path)
    for step in range(3):
        ours, theirs = half.train(step, rollout()), full.train(step, rollout())
        assert ours["train/overflowed_steps"] == ours["train/skipped_steps"] == 0
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=2e-2)


def test_float16_finds_its_scale(mixed_world: None, model: Path, tmp_path: Path) -> None:
    backend, recipe = build(settings(model, "--fp16", "--initial-loss-scale", str(2.0**36)), tmp_path)
    overflows = [recipe.train(step, rollout())["train/overflowed_steps"] for step in range(30)]
    assert overflows[0] == 1
    assert overflows[-1] == 0
    assert recipe.num_skipped == 0
    assert backend.loss_scale.value < 2.0**36


def test_what_is_offloaded_waits_on_the_host_and_trains_alike(mixed_world: None, model: Path, tmp_path: Path) -> None:
    plain, recipe = build(settings(model, "--no-bf16"), tmp_path)
    host, other = build(settings(model, "--no-bf16", "--fsdp-cpu-offload", "--save", str(tmp_path / "s")), tmp_path)
    for step in range(3):
        host.sleep()
        host.wake_up()
        ours, theirs = other.train(step, rollout()), recipe.train(step, rollout())
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-4)
    parameters = list(host.models["actor"].parameters())
    states = [v for entry in host.optimizer.state.values() for v in entry.values()]
    assert not any(tensor.is_cuda for tensor in [*parameters, *states])
    assert all(parameter.to_local().is_pinned() for parameter in parameters)
    for (name, mine), (_, reference) in zip(host.hf_tensors(), plain.hf_tensors(), strict=True):
        assert mine.is_cuda
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5, msg=name)
    host.save(2)
    again, _ = build(settings(model, "--no-bf16", "--fsdp-cpu-offload", "--load", str(tmp_path / "s")), tmp_path)
    for (name, mine), (_, saved) in zip(again.hf_tensors(), host.hf_tensors(), strict=True):
        assert torch.equal(mine, saved), name


def test_a_reference_that_waits_on_the_host_says_the_same(mixed_world: None, model: Path, tmp_path: Path) -> None:
    flags = ("--no-bf16", "--use-kl-loss", "--kl-loss-coef", "0.1", "--ref-update-interval", "1")
    plain, recipe = build(settings(model, *flags), tmp_path)
    before = torch.cuda.memory_allocated()
    parked, other = build(settings(model, *flags, "--offload-ref"), tmp_path)
    num_bytes = sum(parameter.numel() * 4 for parameter in plain.models["ref"].parameters())
    assert torch.cuda.memory_allocated() - before < 1.5 * num_bytes  # the actor's, not the reference's
    for step in range(3):
        ours, theirs = other.train(step, rollout()), recipe.train(step, rollout())
        assert ours["train/kl_loss"] == pytest.approx(theirs["train/kl_loss"], abs=1e-6)
        parked.sleep()
        parked.wake_up()
    batches = everything(other._prepare(0, rollout()))
    for mine, reference in zip(
        parked.log_probs(batches, "ref", entropy=False), plain.log_probs(batches, "ref", entropy=False), strict=True
    ):
        torch.testing.assert_close(mine.log_probs, reference.log_probs, rtol=0, atol=1e-3)


def test_a_checkpoint_written_beside_training_is_of_before_it(mixed_world: None, model: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    backend, recipe = build(settings(model, "--save", str(save), "--async-save"), tmp_path)
    recipe.train(0, rollout())
    weights = {name: tensor.clone() for name, tensor in backend.hf_tensors()}
    backend.save(0)
    backend.sleep()
    backend.wake_up()
    recipe.train(1, rollout())
    backend.finish_save()
    assert json.loads((save / "iter_0000000" / "meta.json").read_text())["rollout_id"] == 0
    again, _ = build(settings(model, "--load", str(save)), tmp_path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.hf_tensors())


@pytest.mark.parametrize("compiled", ["--no-torch-compile", "--torch-compile"])
@pytest.mark.parametrize("recompute", [[], ["--gradient-checkpointing"]])
def test_experts_in_groups_train_as_one_by_one(
    mixed_world: None, tmp_path: Path, compiled: str, recompute: list[str]
) -> None:
    directory = make_tiny_model(
        tmp_path / "moe", "qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=128, num_experts=8,
        initializer_range=0.02,
    )  # fmt: skip
    metrics = []
    for flags in (["--experts-implementation", "eager", "--no-torch-compile"], [compiled]):
        _, recipe = build(settings(directory, *flags, *recompute), tmp_path)
        metrics.append([recipe.train(step, rollout()) for step in range(2)])
    for eager, grouped in zip(*metrics, strict=True):
        assert grouped["train/grad_norm"] == pytest.approx(eager["train/grad_norm"], rel=5e-2)
        assert grouped["rollout/log_probs"] == pytest.approx(eager["rollout/log_probs"], abs=2e-2)


def test_the_history_of_memory_is_written(mixed_world: None, model: Path, tmp_path: Path) -> None:
    history = MemoryHistory(tmp_path / "memory", rank=0, num_steps=2)
    _, recipe = build(settings(model), tmp_path)
    for step in range(2):
        recipe.train(step, rollout())
        history.trained(step)
    (path,) = (tmp_path / "memory").iterdir()
    assert path.name == "rollout_000001_rank_0000.pickle"
    snapshot = pickle.loads(path.read_bytes())
    assert any(trace for trace in snapshot["device_traces"])
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
    assert (tmp_path / "memory" / "out_of_memory_rank_0000.pickle").is_file()
    torch.cuda.memory._record_memory_history(enabled=None)
