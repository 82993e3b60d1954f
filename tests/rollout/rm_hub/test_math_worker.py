import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slime.rollout.rm_hub import math_rule

PROGRAM = Path(math_rule.__file__).with_name("math_worker.py")


@pytest.fixture
def worker():
    with subprocess.Popen([sys.executable, "-P", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline()) == {"ready": True}
        yield process
        process.kill()


def send(worker, answer, timeout_s):
    request = {"answer": answer, "label": r"\boxed{\frac{1}{2}}", "timeout_s": timeout_s}
    worker.stdin.write(json.dumps(request).encode() + b"\n")
    worker.stdin.flush()


def test_it_answers_line_by_line_and_ends_with_its_input(worker):
    for answer, is_correct in [(r"\boxed{0.5}", True), (r"\boxed{0.25}", False)]:
        send(worker, answer, 60)
        assert json.loads(worker.stdout.readline()) == {"correct": is_correct}
    worker.stdin.close()
    assert worker.wait(timeout=30) == 0


def test_a_comparison_that_no_signal_handler_could_interrupt_ends_the_process_at_its_time(worker):
    send(worker, r"\boxed{10^{10^{10}}}", 0.5)
    assert worker.wait(timeout=60) == -signal.SIGALRM


def test_the_time_of_a_comparison_does_not_run_on_after_it(worker):
    for timeout_s in (60, 0.5):
        send(worker, r"\boxed{0.5}", timeout_s)
        worker.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(timeout=1)


def test_it_leaves_ctrl_c_to_its_parent(worker):
    worker.send_signal(signal.SIGINT)
    send(worker, r"\boxed{0.5}", 60)
    assert json.loads(worker.stdout.readline()) == {"correct": True}
