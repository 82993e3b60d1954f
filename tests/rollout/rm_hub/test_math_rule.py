import asyncio
import contextlib
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
import pytest

from slime.rollout.rm_hub.math_rule import MathWorker, math_reward
from slime.utils.types import Sample


@dataclass(frozen=True)
class MathArgs:
    rm_timeout_s: float = 60.0


def score(response, label, args=MathArgs()):
    return asyncio.run(math_reward(args, Sample(response=response, label=label)))


def test_answers_are_compared_where_a_thousand_files_are_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    with contextlib.ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))
        worker = MathWorker()
        files.callback(worker.close)
        assert worker.compare(r"\boxed{2}", r"\boxed{2}", 5.0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("response", "label"),
    [
        (r"so \boxed{34}", "34"),
        (r"so \boxed{34.0}", "34"),
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        (r"so \boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{8}}", r"$2\sqrt{2}$"),
        (r"\boxed{(1, 2)}", r"\boxed{(1,2)}"),
        (r"\boxed{x=5}", "5"),
        ("The answer is $34$.", "34"),
    ],
)
def test_equal_answers_score_one(response, label):
    assert score(response, label) == 1.0


@pytest.mark.parametrize(
    ("response", "label"),
    [(r"\boxed{35}", "34"), (r"\boxed{\frac{1}{3}}", "0.5"), ("no idea", "34"), ("", "34"), (r"\boxed{}", "34")],
)
def test_other_answers_score_zero(response, label):
    assert score(response, label) == 0.0


def test_an_answer_that_takes_for_ever_is_wrong_after_its_time_and_the_next_is_compared(caplog):
    started = time.monotonic()
    assert score(r"\boxed{9^{9^{9^{9}}}}", r"\frac{1}{2}", MathArgs(rm_timeout_s=1.0)) == 0.0
    assert time.monotonic() - started < 60 and "answer counted as wrong" in caplog.text
    assert score(r"\boxed{\frac{1}{2}}", "0.5") == 1.0


def test_a_worker_that_overruns_is_gone():
    worker = MathWorker()
    with pytest.raises(TimeoutError):
        worker.compare(r"\boxed{10^{10^{10}}}", r"\boxed{\frac{1}{2}}", 0.5)
    assert not psutil.pid_exists(worker.pid)


def test_a_worker_ends_when_its_parent_is_killed():
    program = (
        "import time; from slime.rollout.rm_hub.math_rule import MathWorker; worker = MathWorker(); "
        "print(worker.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    worker.wait(timeout=30)


def test_other_work_of_the_event_loop_goes_on_meanwhile():
    async def main():
        pending = asyncio.ensure_future(math_reward(MathArgs(), Sample(response=r"\boxed{\frac{3}{7}}", label="2")))
        turns = 0
        while not pending.done():
            await asyncio.sleep(0.001)
            turns += 1
        return await pending, turns

    reward, turns = asyncio.run(main())
    assert reward == 0.0 and turns > 1
