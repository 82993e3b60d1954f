import io
import logging
import sys

import pytest
from rich.console import Console

from slime.observability.progress import Progress, sparkline


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


METRICS = {
    "rollout/raw_reward": 0.4124,
    "rollout/response_len/mean": 38.2,
    "perf/tokens_per_sec": 1840.2,
    "eval/arith": 0.61,
    "eval/arith-truncated_ratio": 0.0,
}


def make(*, terminal: bool, clock: Clock, num_rollout: int = 40) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    return Progress(num_rollout, console=console, clock=clock), out


def test_without_a_terminal_each_rollout_is_one_plain_line():
    clock = Clock()
    progress, out = make(terminal=False, clock=clock)
    with progress:
        clock.now = 4.0
        progress.update(0, METRICS)
        clock.now = 8.0
        progress.update(1, {"rollout/raw_reward": 0.5})
    lines = out.getvalue().splitlines()
    assert lines == [
        "rollout 1/40   reward 0.412   held-out 0.610   length 38   tok/s 1,840   step 4.0 s   ETA 2:36",
        "rollout 2/40   reward 0.500   held-out 0.610   length 38   tok/s 1,840   step 4.0 s   ETA 2:32",
    ]


def test_without_a_terminal_a_wait_is_told_every_30_seconds_at_most():
    clock = Clock()
    progress, out = make(terminal=False, clock=clock)
    with progress.phase("rollout", "64 samples"):
        for second in range(1, 71):
            clock.now = float(second)
            progress.tick()
    clock.now = 200.0
    progress.tick()
    assert out.getvalue().splitlines() == ["waiting for 64 samples (30 s)", "waiting for 64 samples (60 s)"]


def test_a_short_phase_after_a_long_run_is_not_called_a_wait():
    clock = Clock()
    progress, out = make(terminal=False, clock=clock)
    clock.now = 100.0
    with progress.phase("train"):
        clock.now = 101.0
        progress.tick()
    assert out.getvalue() == ""


def rendered(progress: Progress) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    with console.capture() as capture:
        console.print(progress.render())
    return capture.get()


def test_the_display_opens_before_the_rollouts_are_known_and_their_time_counts_from_their_begin():
    clock = Clock()
    out = io.StringIO()
    progress = Progress(console=Console(file=out, width=120, color_system=None), clock=clock)
    with progress.phase("starting", "engines and trainers to start"):
        assert rendered(progress).startswith("starting")
        clock.now = 40.0
        progress.tick()
    progress.begin(3, 5)
    assert rendered(progress).startswith("rollout 3/5")
    clock.now = 100.0
    progress.begin_step()
    clock.now = 102.0
    progress.update(3, {})
    assert out.getvalue().splitlines() == [
        "waiting for engines and trainers to start (40 s)",
        "rollout 4/5   step 2.0 s   ETA 0:02",
    ]


def test_the_terminal_shows_the_phase_and_what_is_waited_for():
    clock = Clock()
    progress, _ = make(terminal=True, clock=clock)
    progress.update(11, METRICS)
    with progress.phase("rollout", "64 samples"):
        clock.now = 3.0
        with progress.phase("reward"):
            assert "reward" in rendered(progress)
        assert "12/40" in rendered(progress)
        clock.now = 12.0
        assert "waiting for 64 samples (12 s)" in rendered(progress)
    assert "waiting" not in rendered(progress)
    assert "held-out 0.610" in rendered(progress)


def test_log_lines_are_kept_whole_above_the_display(monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    handler = logging.StreamHandler(out)
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        console = Console(file=out, force_terminal=True, width=100, color_system=None)
        with Progress(3, console=console) as progress:
            for i in range(20):
                logging.getLogger("slime.test").warning("line %d of [the log] %s", i, "x" * 150)
                progress.update(0, METRICS)
            sys.stderr.write("from print\n")
        logging.getLogger("slime.test").warning("after the display")
    finally:
        logger.removeHandler(handler)
    flat = out.getvalue().replace("\n", "")
    for i in range(20):
        assert f"line {i} of [the log] " + "x" * 50 in flat
    assert "from print" in flat
    assert handler.stream is out
    assert out.getvalue().endswith("after the display\n")


def test_an_exception_passes_through_and_ends_the_display():
    progress, out = make(terminal=True, clock=Clock())
    with pytest.raises(RuntimeError, match="boom"), progress, progress.phase("train"):
        raise RuntimeError("boom")
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_sparkline_spans_its_least_and_greatest_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0, float("nan")]) == "▁▁ "
    assert sparkline([]) == ""
