import json
from pathlib import Path

import pytest

from slime.observability.timer import PhaseTimer, read_phases


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_timer(run_dir: Path | None, clock: Clock, process: str = "driver", wall: float = 1000.0) -> PhaseTimer:
    return PhaseTimer(run_dir, process=process, wall=lambda: wall, monotonic=clock)


def test_nested_and_repeated_phases_add_up_by_name():
    clock = Clock(5.0)
    timer = make_timer(None, clock)
    for _ in range(2):
        with timer.phase("train"):
            clock.now += 1.0
            with timer.phase("log_probs"):
                clock.now += 0.25
    assert timer.collect() == {"perf/train_time": 2.5, "perf/log_probs_time": 0.5}
    assert timer.collect() == {}


def test_wait_time_ratio_is_the_share_of_waiting():
    clock = Clock(0.0)
    timer = make_timer(None, clock)
    for name, seconds in (("train_wait", 1.0), ("train", 3.0)):
        with timer.phase(name):
            clock.now += seconds
    assert timer.collect()["perf/wait_time_ratio"] == 0.25


def test_a_phase_that_raises_is_recorded(tmp_path: Path):
    clock = Clock(0.0)
    timer = make_timer(tmp_path, clock)
    with pytest.raises(KeyError), timer.phase("train"):
        clock.now += 2.0
        raise KeyError
    timer.close()
    assert timer.collect() == {"perf/train_time": 2.0}
    assert [record.phase for record in read_phases(tmp_path)] == ["train"]


def test_stamps_are_wall_time_even_where_the_wall_clock_jumps(tmp_path: Path):
    clock = Clock(7.0)
    walls = iter([1000.0])
    timer = PhaseTimer(tmp_path, process="trainer 0", wall=lambda: next(walls), monotonic=clock)
    timer.rollout_id = 3
    clock.now = 9.0
    with timer.phase("train"):
        clock.now = 12.5
    timer.close()
    assert json.loads((tmp_path / "phases.jsonl").read_text()) == {
        "rollout_id": 3,
        "phase": "train",
        "start": 1002.0,
        "end": 1005.5,
        "process": "trainer 0",
        "session": 1000.0,
    }


def record_rollouts(run_dir: Path, rollout_ids: list[int], *, wall: float, process: str = "driver") -> None:
    clock = Clock(0.0)
    timer = make_timer(run_dir, clock, process, wall)
    for rollout_id in rollout_ids:
        timer.rollout_id = rollout_id
        with timer.phase("rollout"):
            clock.now += 1.0
    timer.close()


def test_rollouts_that_were_done_again_count_once(tmp_path: Path):
    record_rollouts(tmp_path, [0, 1, 2, 3], wall=100.0)
    record_rollouts(tmp_path, [0, 1, 2], wall=100.5, process="trainer 0")
    record_rollouts(tmp_path, [2, 3], wall=500.0)
    kept = [(r.process, r.rollout_id, r.start) for r in read_phases(tmp_path)]
    assert [(rollout_id, start) for process, rollout_id, start in kept if process == "driver"] == [
        (0, 100.0),
        (1, 101.0),
        (2, 500.0),
        (3, 501.0),
    ]
    assert [rollout_id for process, rollout_id, _ in kept if process == "trainer 0"] == [0, 1, 2]


def test_a_disk_that_is_full_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "phases.jsonl").symlink_to("/dev/full")
    timer = make_timer(tmp_path, Clock(0.0))
    for _ in range(3):
        with timer.phase("train"):
            pass
    timer.close()
    assert len([record for record in caplog.records if "phase times are not recorded" in record.message]) == 1


def test_a_run_without_phases_reads_as_none(tmp_path: Path):
    assert read_phases(tmp_path) == []
