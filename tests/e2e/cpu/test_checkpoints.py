"""What happens to checkpoints when a save fails, is interrupted, or is of another model."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cpu.helpers.checkpoints import differing, saved_state
from tests.e2e.cpu.helpers.runs import TRAINER, Starter, wait_for
from tests.helpers.tiny_models import make_tiny_model

TRACKER = "latest_checkpointed_iteration.txt"
pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB: one checkpoint of the tiny model fits, two do not."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]).returncode == 0
    )
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("when", [[], ["--async-save"]])
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    start: Starter, small_disk: Path, when: list[str]
) -> None:
    run = start("--num-rollout", "4", "--save-interval", "1", "--save", str(small_disk), *when)
    assert run.wait(120) == 1
    message = run.output()[run.output().index("error: ") :]
    assert f"{small_disk}/iter_0000001 cannot be written; 0." in message
    assert "MiB were free there" in message
    assert not list(small_disk.glob(".*"))
    assert (small_disk / TRACKER).read_text() == "0"
    assert saved_state(small_disk / "iter_0000000")
    run.leaves_nothing()


def test_a_save_that_is_killed_leaves_the_checkpoint_before_it(start: Starter) -> None:
    save = start.folder / "ckpt"
    flags = ("--save-interval", "1", "--save", str(save))
    first = start(*flags, "--num-rollout", "1000").reaches("record_000001.json")
    wait_for(lambda: list(save.glob(".iter_*.tmp")), timeout_s=60, what="a save under way")
    for trainer in first.processes(TRAINER):
        trainer.send_signal(signal.SIGKILL)
    assert first.wait(60) == 1
    first.leaves_nothing()
    step = int((save / TRACKER).read_text())
    assert saved_state(save / f"iter_{step:07d}")
    resumed = start(*flags, "--resume", "--num-rollout", str(step + 2)).succeeds()
    assert (save / TRACKER).read_text() == str(step + 1)
    assert not list(save.glob(".iter_*.tmp"))
    resumed.leaves_nothing(within_s=5)


def test_a_run_that_saves_beside_training_ends_with_the_last_checkpoint_complete(start: Starter) -> None:
    save = start.folder / "ckpt"
    flags = ("--async-save", "--save", str(save), "--save-hf", str(start.folder / "hf_{rollout_id}"))
    plain = start("--num-rollout", "3", "--save-interval", "1", "--save", str(start.folder / "plain"), name="plain")
    plain.succeeds()
    run = start(*flags, "--num-rollout", "2", "--save-interval", "1").succeeds()
    assert (save / TRACKER).read_text() == "1"
    assert not list(save.glob(".iter_*"))
    assert (start.folder / "hf_1" / "config.json").is_file()
    run.leaves_nothing()
    start(*flags, "--resume", "--num-rollout", "3", name="resumed").succeeds()
    states = [saved_state(root / "iter_0000002") for root in (save, start.folder / "plain")]
    assert states[0]
    assert differing(*states) == []  # as the run that was never interrupted
    again = start(*flags, "--resume", "--num-rollout", "3", name="again").succeeds()
    assert "nothing is trained: 3 rollouts are done, the run has 3" in again.output()


def test_a_checkpoint_of_another_model_is_refused(start: Starter) -> None:
    save = str(start.folder / "ckpt")
    start("--num-rollout", "1", "--save", save).succeeds()
    wider = make_tiny_model(start.folder / "wider", intermediate_size=160)
    run = start("--hf-checkpoint", str(wider), "--load", save)
    assert run.wait(60) == 1
    message = run.output()[run.output().index("error: ") :]
    for part in ("iter_0000000", "mlp", "(128, 64)", "(160, 64)"):
        assert part in message
    run.leaves_nothing()
