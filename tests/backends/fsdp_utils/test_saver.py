"""Checkpoints written while training goes on; on a disk that is full, in tests/e2e/cpu/test_checkpoints.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.training import full_weights, make_backend, make_recipe, random_batch, run_ranks, settings_for
from transformers import AutoModelForCausalLM

from slime.backends.fsdp_utils import checkpoint
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.fsdp_utils.checkpoint import find_checkpoint
from slime.backends.shared import checkpoint as shared_checkpoint
from slime.backends.shared.checkpoint import CheckpointError, iteration_folder
from slime.backends.shared.offload import HostBuffer, snapshot
from slime.config.base import ConfigError

STEADY = {"adam_eps": 1e-4, "lr": 1e-3}


def saving(model: Path, folder: Path, **settings: Any) -> FSDPBackend:
    backend = make_backend(settings_for(model, save=str(folder), async_save=True, **STEADY | settings))
    backend.load()
    return backend


def train(backend: FSDPBackend, rollout_id: int) -> None:
    make_recipe(backend, backend.run, Path("unused")).train(rollout_id, random_batch(seed=rollout_id))  # type: ignore[arg-type]


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checkpoints are written once this is set."""
    may_write = threading.Event()
    write: Callable[..., None] = checkpoint.save

    def held_back(*args: Any, **kwargs: Any) -> None:
        assert may_write.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", held_back)
    yield may_write
    may_write.set()


def test_training_goes_on_and_the_checkpoint_holds_what_was(model: Path, tmp_path: Path, gate: threading.Event) -> None:
    backend = saving(model, tmp_path, save_hf=str(tmp_path / "hf"))
    train(backend, 0)
    weights = full_weights(backend)
    torch.manual_seed(5)
    backend.save(0)
    numbers = torch.rand(3)
    train(backend, 1)  # while the write is held back
    assert find_checkpoint(str(tmp_path), None) is None
    gate.set()
    backend.finish_save()
    assert find_checkpoint(str(tmp_path), None) == iteration_folder(str(tmp_path), 0)
    again = make_backend(settings_for(model, load=str(tmp_path), **STEADY))
    assert again.load() == 1
    assert same(full_weights(again), weights)
    assert torch.equal(torch.rand(3), numbers)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in lm.named_parameters())
    train(again, 1)
    assert same(full_weights(again), full_weights(backend))  # interrupted and resumed is as uninterrupted


def test_a_save_waits_for_the_one_before(model: Path, tmp_path: Path, gate: threading.Event) -> None:
    backend = saving(model, tmp_path)
    backend.save(0)
    opened = threading.Timer(0.3, gate.set)
    opened.start()
    backend.save(1)
    opened.join()
    assert find_checkpoint(str(tmp_path), None) == iteration_folder(str(tmp_path), 0)
    backend.finish_save()
    assert find_checkpoint(str(tmp_path), None) == iteration_folder(str(tmp_path), 1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_save_that_does_not_end_is_an_error_after_the_deadline(
    model: Path, tmp_path: Path, gate: threading.Event
) -> None:
    backend = saving(model, tmp_path, train_timeout_s=0.2)
    backend.save(0)
    with pytest.raises(CheckpointError, match=r"was not written within 0.2 s \(--train-timeout-s\)"):
        backend.finish_save()


@pytest.mark.parametrize("moment", ["next step", "next save", "end"])
def test_a_save_that_fails_ends_training_in_one_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    backend = saving(model, tmp_path)
    backend.save(0)
    backend.finish_save()
    with monkeypatch.context() as patch:
        patch.setattr(shared_checkpoint, "fsync_tree", no_space)
        backend.save(1)
        with pytest.raises(OSError):
            backend.saver._thread.submit(no_space).result(60)  # the thread has come so far
        with pytest.raises(CheckpointError, match=r"iter_0000001 cannot be written; .*No space left") as failure:
            {"next step": lambda: train(backend, 1), "next save": lambda: backend.save(2), "end": backend.finish_save}[
                moment
            ]()
    assert len(str(failure.value).splitlines()) == 1
    assert find_checkpoint(str(tmp_path), None) == iteration_folder(str(tmp_path), 0)
    backend.save(1)
    backend.finish_save()
    assert find_checkpoint(str(tmp_path), None) == iteration_folder(str(tmp_path), 1)


def two_ranks(model: Path, folder: Path) -> None:
    """Rollout 1 is trained while the state after rollout 0 is written; then again from there."""
    backend = saving(model, folder, save_hf=str(folder / "hf"), actor_num_gpus_per_node=2)
    train(backend, 0)
    backend.save(0)
    train(backend, 1)
    weights = full_weights(backend)
    backend.finish_save()
    again = make_backend(settings_for(model, load=str(folder), actor_num_gpus_per_node=2, **STEADY))
    assert again.load() == 1
    train(again, 1)
    resumed = full_weights(again)
    if dist.get_rank() == 0:
        torch.save([weights, resumed], folder / "weights.pt")


def test_two_ranks_save_beside_training_bit_for_bit(model: Path, tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, model, tmp_path, store=tmp_path / "store")
    assert same(*torch.load(tmp_path / "weights.pt"))


def test_a_snapshot_keeps_what_was() -> None:
    state = {"a": [torch.arange(5), torch.zeros(())], "b": {"c": torch.ones(3, 2, dtype=torch.bfloat16), "d": 7}}
    buffer = HostBuffer()
    taken = snapshot(state, buffer)
    assert taken["b"]["d"] == 7
    for tensor in (*state["a"], state["b"]["c"]):
        tensor.add_(1)
    assert taken["a"][0].tolist() == [0, 1, 2, 3, 4]
    assert (float(taken["a"][1]), float(taken["b"]["c"].sum())) == (0.0, 6.0)
    again = snapshot(state, buffer)
    assert again["a"][0].data_ptr() == taken["a"][0].data_ptr(), "room is used again"
    assert taken["a"][0].tolist() == [1, 2, 3, 4, 5]


def test_without_a_folder_there_is_nothing_to_save_beside(model: Path) -> None:
    with pytest.raises(ConfigError, match="--async-save needs --save"):
        settings_for(model, async_save=True)
