import importlib.util
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from slime.observability.sinks import open_sinks
from slime.observability.tracking import Tracker, open_tracker, read_metrics


@dataclass(frozen=True)
class Config:
    use_tensorboard: bool = False
    tb_project_name: str | None = None
    tb_experiment_name: str | None = None
    use_wandb: bool = False
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    wandb_dir: str | None = None
    wandb_key: str | None = None
    wandb_host: str | None = None
    wandb_team: str | None = None
    wandb_group: str | None = None
    wandb_project: str | None = None
    wandb_run_id: str | None = None
    wandb_random_suffix: bool = True
    wandb_always_use_train_step: bool = False


def test_a_line_has_time_axis_step_and_metrics(tmp_path: Path):
    with Tracker(tmp_path, clock=lambda: 100.5) as tracker:
        tracker.log("train/step", 3, {"train/loss": 0.25})
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"time": 100.5, "axis": "train/step", "step": 3, "metrics": {"train/loss": 0.25}}


def test_lines_of_one_step_are_merged_and_axes_kept_apart(tmp_path: Path):
    times = iter([0.0, 1.0, 2.0, 3.0, 4.0])
    with Tracker(tmp_path, clock=lambda: next(times)) as tracker:
        tracker.log("rollout/step", 0, {"rollout/raw_reward": 0.5})
        tracker.log("rollout/step", 0, {"perf/train_time": 2})
        tracker.log("rollout/step", 1, {"rollout/raw_reward": math.inf})
        tracker.log("eval/step", 0, {"eval/arith": math.nan})
    metrics = read_metrics(tmp_path)
    assert metrics["rollout/step"]["rollout/raw_reward"] == ([0, 1], [0.5, math.inf], [1.0, 3.0])
    assert metrics["rollout/step"]["perf/train_time"] == ([0], [2.0], [2.0])
    assert math.isnan(metrics["eval/step"]["eval/arith"].values[0])
    assert "train/step" not in metrics


def test_a_resumed_run_supersedes_each_axis_from_the_first_step_it_logs(tmp_path: Path):
    with Tracker(tmp_path) as tracker:
        for step in range(5):
            tracker.log("rollout/step", step, {"rollout/raw_reward": 0.0, "rollout/only_before": 1.0})
            tracker.log("train/step", 2 * step, {"train/loss": 0.0})
            tracker.log("train/step", 2 * step + 1, {"train/loss": 0.0})
        tracker.log("eval/step", 0, {"eval/arith": 0.1})
    with Tracker(tmp_path, start_rollout_id=3) as tracker:
        tracker.log("rollout/step", 3, {"rollout/raw_reward": 1.0})
        tracker.log("train/step", 6, {"train/loss": 1.0})
        tracker.log("rollout/step", 3, {"perf/step_time": 1.0})
    metrics = read_metrics(tmp_path)
    assert metrics["rollout/step"]["rollout/raw_reward"][:2] == ([0, 1, 2, 3], [0.0, 0.0, 0.0, 1.0])
    assert metrics["rollout/step"]["rollout/only_before"].steps == [0, 1, 2]
    assert metrics["train/step"]["train/loss"][:2] == ([0, 1, 2, 3, 4, 5, 6], [0.0] * 6 + [1.0])
    assert metrics["eval/step"]["eval/arith"].steps == [0]
    assert metrics["session"]["start_rollout_id"].values == [0.0, 3.0]


def test_out_of_order_steps_within_a_session_are_kept(tmp_path: Path):
    with Tracker(tmp_path) as tracker:
        for step in (0, 2, 1):
            tracker.log("rollout/step", step, {"rollout/raw_reward": float(step)})
    assert read_metrics(tmp_path)["rollout/step"]["rollout/raw_reward"][:2] == ([0, 1, 2], [0.0, 1.0, 2.0])


def test_a_run_killed_in_the_middle_of_a_line_is_read_and_resumed(tmp_path: Path):
    with Tracker(tmp_path) as tracker:
        tracker.log("rollout/step", 0, {"rollout/raw_reward": 0.0})
        tracker.log("rollout/step", 1, {"rollout/raw_reward": 0.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert read_metrics(tmp_path)["rollout/step"]["rollout/raw_reward"].steps == [0]
    with Tracker(tmp_path, start_rollout_id=1) as tracker:
        tracker.log("rollout/step", 1, {"rollout/raw_reward": 1.0})
    assert read_metrics(tmp_path)["rollout/step"]["rollout/raw_reward"][:2] == ([0, 1], [0.0, 1.0])


def test_an_unknown_axis_and_a_foreign_file_are_refused(tmp_path: Path):
    with Tracker(tmp_path) as tracker, pytest.raises(ValueError, match="axis must be one of rollout/step"):
        tracker.log("epoch", 0, {})  # type: ignore[arg-type]
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a line of metrics"):
        read_metrics(tmp_path)


class BrokenSink:
    name = "broken"
    failures = (OSError,)

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_sink_that_fails_is_named_once_and_the_rest_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, sinks=[BrokenSink()]) as tracker:
        for step in range(4):
            tracker.log("rollout/step", step, {"rollout/raw_reward": 1.0})
    assert [record.message for record in caplog.records] == [
        "broken fails, the run goes on without it: [Errno 28] No space left on device",
        "broken missed 5 updates",
    ]
    assert read_metrics(tmp_path)["rollout/step"]["rollout/raw_reward"].steps == [0, 1, 2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_jsonl_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        Tracker(tmp_path)


def test_tensorboard_reads_back_what_was_logged_over_a_resume(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config(use_tensorboard=True, tb_experiment_name="first")
    with open_tracker(config, tmp_path, start_rollout_id=0, arguments={}) as tracker:
        tracker.log("rollout/step", 0, {"rollout/raw_reward": 0.25})
    with open_tracker(config, tmp_path, start_rollout_id=1, arguments={}) as tracker:
        tracker.log("rollout/step", 1, {"rollout/raw_reward": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "first"))
    events.Reload()
    points = [event.tensor_proto.float_val[0] for event in events.Tensors("rollout/raw_reward")]
    assert points == [0.25, 0.5]


def test_no_sink_is_opened_unless_asked_for(tmp_path: Path):
    assert open_sinks(Config(), tmp_path, {}) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_one_clear_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match="--use-wandb needs the wandb package.*pip install 'slime"):
        open_tracker(Config(use_wandb=True), tmp_path, start_rollout_id=0, arguments={})


@pytest.mark.parametrize("use_train_step", [False, True])
def test_wandb_continues_the_run_of_its_directory(tmp_path: Path, use_train_step: bool):
    pytest.importorskip("wandb")
    config = Config(
        use_wandb=True,
        wandb_mode="offline",
        wandb_group="demo",
        wandb_project="slime",
        wandb_always_use_train_step=use_train_step,
    )
    for start in (0, 1):
        with open_tracker(config, tmp_path, start_rollout_id=start, arguments={"lr": 0.1}) as tracker:
            tracker.log("train/step", 4 * start + 3, {"train/loss": 0.5})
            tracker.log("rollout/step", start, {"rollout/raw_reward": 0.25})
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert runs and all(list(run.glob("*.wandb")) for run in runs)
