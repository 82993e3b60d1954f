"""Checkpoints written while training goes on; what does not depend on the backend is in fsdp_utils/test_saver.py."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import STEADY, equal, make_megatron, trained
from helpers.training import full_weights, make_recipe, random_batch, run_ranks, settings_for
from transformers import AutoModelForCausalLM

from slime.backends.megatron_utils.folders import find_checkpoint
from slime.backends.shared.checkpoint import TRACKER, CheckpointError, iteration_folder

DISTRIBUTED = {"use_distributed_optimizer": True}
WAYS: list[dict[str, Any]] = [{}, DISTRIBUTED, {"ckpt_format": "torch"}, {"ckpt_format": "torch", **DISTRIBUTED}]
DEADLINE_S = 120


def saving(model: Path, folder: Path, parallel: dict[str, Any], **settings: Any) -> Any:
    args = settings_for(model, save=str(folder), async_save=True, **STEADY | settings)
    backend = make_megatron(args, **parallel)
    backend.load()
    return backend


def train(backend: Any, rollout_id: int) -> None:
    make_recipe(backend, backend.run, Path("unused")).train(rollout_id, random_batch(seed=rollout_id))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checkpoints are written once this is set."""
    from slime.backends.megatron_utils import checkpoint

    may_write = threading.Event()
    write: Callable[..., None] = checkpoint.save

    def held_back(*args: Any, **kwargs: Any) -> None:
        assert may_write.wait(DEADLINE_S)
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", held_back)
    yield may_write
    may_write.set()


@pytest.mark.parametrize("parallel", WAYS)
def test_training_goes_on_and_the_checkpoint_holds_what_was(
    parallel: dict[str, Any], model: Path, tmp_path: Path, gate: threading.Event
) -> None:
    backend = saving(model, tmp_path, parallel, save_hf=str(tmp_path / "hf"))
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
    again = make_megatron(settings_for(model, load=str(tmp_path), **STEADY), **parallel)
    assert again.load() == 1
    assert equal(full_weights(again), weights)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), numbers)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in lm.named_parameters())
    train(again, 1)
    assert equal(full_weights(again), full_weights(backend))  # type: ignore[arg-type]


def two_ranks(model: Path, folder: Path) -> None:
    """The first rank may write what it likes, the second no file above 64 KiB: a disk that is full there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with megatron_on_cpu():
        for number, parallel in enumerate(WAYS):
            save = folder / str(number)
            backend = saving(model, save, {"tensor_model_parallel_size": 2} | parallel)
            backend.save(0)
            backend.finish_save()
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if dist.get_rank() == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
            backend.save(1)
            with pytest.raises(CheckpointError, match="iter_0000001 cannot be written; .*rank 1: ") as failure:
                backend.finish_save()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert len(str(failure.value).splitlines()) == 1
            assert (save / TRACKER).read_text() == "0"
            assert {path.name for path in save.iterdir()} == {TRACKER, "iter_0000000"}
            backend.save(1)
            backend.finish_save()
            assert (save / TRACKER).read_text() == "1"


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank_is_reported_by_all_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, model, tmp_path, store=tmp_path / "store")


def killed_while_writing(model: Path, folder: Path, store: Path, parallel: dict[str, Any]) -> None:
    """Dies by SIGKILL when the files of step 1 are written and not yet the checkpoint."""
    from slime.backends.shared import checkpoint as shared_checkpoint

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    with megatron_on_cpu():
        backend = saving(model, folder, parallel)
        backend.save(0)
        backend.finish_save()
        train(backend, 1)
        shared_checkpoint.fsync_tree = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        backend.save(1)
        backend.finish_save()


@pytest.mark.parametrize("parallel", [{}, {"ckpt_format": "torch"}])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    parallel: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    process = multiprocessing.get_context("spawn").Process(
        target=killed_while_writing, args=(model, save, tmp_path / "store", parallel)
    )
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode == -signal.SIGKILL
    assert any(path.name.startswith(".iter_0000001") for path in save.iterdir())
    trained(model, save, [1], first=1, load=str(save), parallel=parallel)
    assert {path.name for path in save.iterdir()} == {TRACKER, "iter_0000000", "iter_0000001"}
