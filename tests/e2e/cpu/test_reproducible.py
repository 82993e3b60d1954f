"""Equal seeds give equal runs, and a run that was killed and resumed is the run that was not: bit for bit."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cpu.helpers.checkpoints import differing, saved_state
from tests.e2e.cpu.helpers.runs import Run, Starter, wait_for

FLAGS = (
    *("--num-rollout", "4", "--save-interval", "1", "--num-steps-per-rollout", "2", "--rollout-shuffle"),
    *("--use-kl-loss", "--kl-loss-coef", "0.05", "--lr-decay-style", "cosine", "--weight-decay", "0.1"),
    *("--rollout-batch-size", "4", "--rollout-max-response-len", "24"),
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path) -> Iterator[Run]:
    """A run of 4 rollouts, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with tempfile.TemporaryDirectory(prefix="slime-test-") as weights_root:
        starter = Starter(folder, model, prompts, Path(weights_root))
        yield starter(*FLAGS, "--save", str(folder / "ckpt")).succeeds()
        starter.end()


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    """Without times, and without what the engine's cache held when a request came, which is a matter of time too."""
    return {key: value for key, value in values.items() if not key.startswith("perf/") and "prefix_cache" not in key}


def _metrics(run: Run, axis: str) -> list[dict[str, Any]]:
    return [_timeless(metrics) for metrics in run.metrics(axis)]


def _samples(run: Run, rollout_id: int) -> list[dict[str, Any]]:
    return [_timeless(sample) for sample in run.samples(rollout_id)]


def _differences(left: Run, right: Run, step: int) -> list[str]:
    folders = [run.run_dir.parent / "ckpt" / f"iter_{step:07d}" for run in (left, right)]
    states = [saved_state(folder) for folder in folders]
    assert any(name.startswith("optimizer.") for name in states[0])
    assert any(name.startswith("model.") for name in states[0])
    cursors = [folder.parent / "rollout" / f"global_dataset_state_dict_{step}.pt" for folder in folders]
    assert cursors[0].read_text() == cursors[1].read_text()
    return differing(*states)


def test_two_equal_seeded_runs_are_equal_bit_for_bit(uninterrupted: Run, start: Starter) -> None:
    run = start(*FLAGS, "--save", str(start.folder / "ckpt")).succeeds()
    for rollout_id in range(4):
        assert _samples(run, rollout_id) == _samples(uninterrupted, rollout_id)
        assert _differences(run, uninterrupted, rollout_id) == []
    for axis in ("rollout/step", "train/step"):
        assert _metrics(run, axis) == _metrics(uninterrupted, axis)


@pytest.mark.parametrize("when", [[], ["--async-save"]])
def test_a_run_killed_and_resumed_equals_the_uninterrupted_one(
    uninterrupted: Run, start: Starter, when: list[str]
) -> None:
    flags = (*FLAGS, "--save", str(start.folder / "ckpt"), *when)
    tracker = start.folder / "ckpt" / "latest_checkpointed_iteration.txt"
    first = start(*flags)
    wait_for(lambda: tracker.is_file() and tracker.read_text() == "1", timeout_s=120, what="the checkpoint of step 1")
    first.process.send_signal(signal.SIGKILL)
    first.leaves_nothing()
    resumed = start(*flags, "--resume").succeeds()
    assert "loaded " in resumed.output()
    for rollout_id in range(4):
        assert _samples(resumed, rollout_id) == _samples(uninterrupted, rollout_id)
    assert _differences(resumed, uninterrupted, 3) == []
    assert _metrics(resumed, "train/step")[-1] == _metrics(uninterrupted, "train/step")[-1]


def test_a_checkpoint_of_two_ranks_loads_on_one_at_the_step_asked_for(start: Starter) -> None:
    two = start(
        "--actor-num-gpus-per-node", "2", "--save-interval", "1", "--save", str(start.folder / "two"), name="two"
    )
    two.succeeds()
    frozen = ("--lr", "0", "--load", str(start.folder / "two"), "--save", str(start.folder / "one"))
    one = start(*frozen, "--ckpt-step", "0", name="one").succeeds()
    assert [record["rollout/failed"] for record in one.metrics()] == [0.0]
    assert {sample["index"] for sample in one.samples(1)} == set(range(8, 16))
    weights = [
        {name: value for name, value in saved_state(folder).items() if name.startswith("model.")}
        for folder in (start.folder / "two" / "iter_0000000", start.folder / "one" / "iter_0000001")
    ]
    assert differing(*weights) == []
