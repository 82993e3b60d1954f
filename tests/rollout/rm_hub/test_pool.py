"""Synchronous reward functions in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from slime.rollout.rm_hub import RewardError, async_rm, batched_async_rm, pool
from slime.utils.async_utils import run
from slime.utils.types import Sample


@dataclass(frozen=True)
class RewardArgs:
    custom_rm_path: str
    rm_timeout_s: float = 60.0
    rm_num_workers: int | None = 2
    group_rm: bool = False
    custom_rm_style: str = "slime"


def settings(name: str, **fields: Any) -> RewardArgs:
    return RewardArgs(f"{__name__}.{name}", **fields)


def pid(args: Any, sample: Sample) -> float:
    return float(os.getpid())


def label_as_number(args: Any, sample: Sample, *, scale: float = 1.0) -> float:
    return scale * float(sample.label or 0)


def group_of_numbers(args: Any, samples: list[Sample]) -> list[float]:
    for sample in samples:
        sample.metadata["seen"] = len(samples)
        sample.remove_sample = True
    return [float(sample.label or 0) for sample in samples]


def timeout_of_settings(args: Any, sample: Sample) -> float:
    return float(args.rm_timeout_s)


def raises(args: Any, sample: Sample) -> float:
    raise KeyError("no such tool")


def exits(args: Any, sample: Sample) -> float:
    sys.exit("thank you")


def dies(args: Any, sample: Sample) -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0


def sleeps_for_ever(args: Any, sample: Sample) -> float:
    while True:
        threading.Event().wait()


def spins_in_c(args: Any, sample: Sample) -> float:
    """One call of the regular expression engine, which lets no other thread of its interpreter run."""
    return float(re.match(r"(a|aa)+$", "a" * 200 + "b") is None)


def starts_a_child_and_hangs(args: Any, sample: Sample) -> float:
    with open(sample.metadata["pid_file"], "w") as file, subprocess.Popen(["sleep", "600"]) as child:
        file.write(str(child.pid))
        file.flush()
    return 1.0


async def _two() -> float:
    return 2.0


def returns_a_coroutine(args: Any, sample: Sample) -> Any:
    return _two()


def has_an_alarm(args: Any, sample: Sample) -> float:
    """As graders with a time limit of their own do: a signal handler can be set in a main thread only."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    return 1.0


def score(args: RewardArgs, sample: Sample | None = None, **kwargs: Any) -> Any:
    return run(async_rm(args, sample or Sample(index=7), **kwargs))


def test_a_function_runs_in_another_process_which_is_used_again() -> None:
    first, second = score(settings("pid")), score(settings("pid"))
    assert first == second != os.getpid()


def test_settings_samples_and_keywords_reach_the_function_and_its_notes_come_back() -> None:
    assert score(settings("label_as_number"), Sample(label="3"), scale=2.0) == 6.0
    samples = [Sample(label="1"), Sample(label="2")]
    assert run(batched_async_rm(settings("group_of_numbers", group_rm=True), samples)) == [1.0, 2.0]
    assert [(sample.metadata, sample.remove_sample) for sample in samples] == [({"seen": 2}, True)] * 2


@pytest.mark.parametrize("name", ["returns_a_coroutine", "has_an_alarm"])
def test_functions_that_a_thread_could_not_run_give_their_reward(name: str) -> None:
    assert score(settings(name)) > 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "raised KeyError: 'no such tool'"),
        ("exits", "raised SystemExit: thank you"),
        ("dies", "its process ended while it ran"),
    ],
)
def test_a_function_that_fails_names_itself_sample_and_reason_and_the_next_is_scored(name: str, reason: str) -> None:
    with pytest.raises(RewardError, match=f"reward .*{name}, sample 7: {reason}"):
        score(settings(name))
    assert score(settings("label_as_number"), Sample(label="3")) == 3.0


def test_the_traceback_of_a_function_that_raises_is_kept() -> None:
    with pytest.raises(RewardError) as caught:
        score(settings("raises"))
    assert "in raises" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["sleeps_for_ever", "spins_in_c"])
def test_a_function_that_never_returns_fails_at_its_deadline_and_is_gone(name: str) -> None:
    before = workers()
    with pytest.raises(RewardError, match=r"sample 7: no reward within 0.5 s \(--rm-timeout-s\)"):
        score(settings(name, rm_timeout_s=0.5))
    wait_until(lambda: workers() <= before)


@pytest.mark.parametrize("name", ["sleeps_for_ever", "spins_in_c"])
def test_functions_that_never_return_hold_up_neither_the_event_loop_nor_other_rewards(name: str) -> None:
    async def main() -> tuple[float, int]:
        stuck = asyncio.ensure_future(async_rm(settings(name), Sample()))
        turns = 0
        scored = asyncio.ensure_future(async_rm(settings("label_as_number"), Sample(label="5")))
        while not scored.done():
            turns += 1
            await asyncio.sleep(0.001)
        assert not stuck.done()
        stuck.cancel()
        return float(scored.result()), turns  # type: ignore[arg-type]

    reward, turns = run(main())
    assert reward == 5.0
    assert turns > 1


@pytest.mark.parametrize("name", ["sleeps_for_ever", "spins_in_c"])
def test_cancelling_waits_for_nothing_and_ends_the_function_soon(name: str) -> None:
    async def main() -> float:
        task = asyncio.ensure_future(async_rm(settings(name), Sample()))
        while workers() == {worker.pid for worker in pool._idle}:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - started

    assert run(main()) < 5.0
    wait_until(lambda: workers() == {worker.pid for worker in pool._idle})


def test_a_function_that_ends_soon_after_it_was_cancelled_keeps_its_process() -> None:
    async def cancelled() -> None:
        task = asyncio.ensure_future(async_rm(settings("takes_a_moment"), Sample()))
        while workers() == {worker.pid for worker in pool._idle}:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while pool._running:
            await asyncio.sleep(0.01)

    before = score(settings("takes_a_moment"))
    run(cancelled())
    assert score(settings("takes_a_moment")) == before


def test_the_number_of_processes_is_bounded_and_those_that_wait_keep_their_time() -> None:
    async def main() -> list[Any]:
        args = settings("takes_a_moment", rm_timeout_s=5.0, rm_num_workers=1)
        return await asyncio.gather(*(async_rm(args, Sample()) for _ in range(4)))

    assert len(set(run(main()))) == 1


def takes_a_moment(args: Any, sample: Sample) -> float:
    threading.Event().wait(0.2)
    return float(os.getpid())


def test_what_a_function_started_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with pytest.raises(RewardError):
        score(settings("starts_a_child_and_hangs", rm_timeout_s=2.0), Sample(metadata={"pid_file": str(file)}))
    child = int(file.read_text())
    wait_until(lambda: has_ended(child))


def test_a_worker_ends_when_its_parent_is_killed_even_while_it_spins() -> None:
    program = (
        "import asyncio; from slime.rollout.rm_hub.pool import call_in_worker\n"
        "deadline = {'sample_index': 0, 'timeout_s': 600, 'num_workers': 1}\n"
        f"asyncio.run(call_in_worker('{__name__}.spins_in_c', (None, None), {{}}, **deadline))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as parent:
        children: list[psutil.Process] = []

        def is_spinning() -> bool:
            children[:] = psutil.Process(parent.pid).children()
            return any(child.cpu_times().user > 0.6 for child in children)

        wait_until(is_spinning)
        parent.kill()
    wait_until(lambda: not any(child.is_running() for child in children))


def test_a_function_is_imported_from_where_this_process_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(settings("pid"))
    (tmp_path / "late_rewards.py").write_text("def two(args, sample):\n    return 2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score(RewardArgs("late_rewards.two")) == 2.0


def test_arguments_that_cannot_be_sent_say_what_to_do() -> None:
    with pytest.raises(RewardError, match="cannot be sent to a process .* make it async, or set --rm-num-workers 0"):
        score(settings("pid"), Sample(metadata={"lock": threading.Lock()}))


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def workers() -> set[int]:
    """The worker processes that run."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and any("worker_process" in part for part in child.cmdline()):
                found.add(child.pid)
    return found


def wait_until(condition: Any, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_each_call_has_its_own_settings_though_a_process_is_sent_them_once() -> None:
    several = [settings("timeout_of_settings", rm_timeout_s=float(seconds), rm_num_workers=1) for seconds in (10, 20)]

    async def rewards() -> list[Any]:
        return [await async_rm(args, Sample(index=0)) for args in [several[0], several[0], several[1], several[0]]]

    assert run(rewards()) == [10.0, 10.0, 20.0, 10.0]


def test_settings_that_are_not_frozen_are_sent_as_they_are_at_each_call() -> None:
    args = SimpleNamespace(**vars(settings("timeout_of_settings", rm_num_workers=1)))

    async def reward(seconds: float) -> Any:
        args.rm_timeout_s = seconds
        return await async_rm(args, Sample(index=0))

    assert [run(reward(30.0)), run(reward(40.0))] == [30.0, 40.0]
