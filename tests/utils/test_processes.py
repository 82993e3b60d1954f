"""Processes and folders that end with their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from slime.utils.processes import OwnedProcess, owned_directory, raise_open_file_limit, sole_user
from tests.e2e.cpu.helpers.runs import ROOT, wait_for

WAIT = "import threading; threading.Event().wait()"
SLEEP = [sys.executable, "-c", WAIT]
DEAF = [sys.executable, "-c", f"import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); {WAIT}"]
OWNER = """
import sys, threading
from pathlib import Path
from slime.utils.processes import OwnedProcess, owned_directory
with owned_directory(Path(sys.argv[1]), prefix="mine-") as folder:
    (folder / "weights").write_text("x")
    wait = [sys.executable, "-c", "import threading; threading.Event().wait()"]
    process = OwnedProcess(wait, log_path=Path(sys.argv[1] + ".log"))
    print(process._guard.pid, flush=True)
    threading.Event().wait()
"""


def _command_of(process: OwnedProcess) -> psutil.Process:
    children = wait_for(lambda: psutil.Process(process._guard.pid).children(), timeout_s=10, what="the command")
    return children[0]


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_output_goes_to_the_log_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"]
    process = OwnedProcess(command, log_path=tmp_path / "logs" / "one.log")
    assert wait_for(process.poll, timeout_s=10, what="its end") == 3
    assert sorted(process.log_tail().splitlines()) == ["err", "out"]


def test_the_log_tail_is_the_last_lines(tmp_path: Path) -> None:
    process = OwnedProcess([sys.executable, "-c", "print(*range(100), sep='\\n')"], log_path=tmp_path / "log")
    wait_for(lambda: process.poll() is not None, timeout_s=10, what="its end")
    assert process.log_tail(3) == "97\n98\n99"


def test_a_signal_is_reported_as_shells_do(tmp_path: Path) -> None:
    process = OwnedProcess(SLEEP, log_path=tmp_path / "log")
    _command_of(process).send_signal(signal.SIGKILL)
    assert wait_for(process.poll, timeout_s=10, what="its end") == 137


def test_stop_ends_a_process_that_ignores_sigterm(tmp_path: Path) -> None:
    process = OwnedProcess(DEAF, log_path=tmp_path / "log")
    wait_for(lambda: process.log_tail() == "up", timeout_s=10, what="its start")
    command = _command_of(process)
    process.stop()
    assert not command.is_running()
    assert process.poll() is not None


def test_stop_ends_what_the_command_has_started(tmp_path: Path) -> None:
    script = (
        f"import subprocess, threading; print(subprocess.Popen({SLEEP!r}).pid, flush=True); threading.Event().wait()"
    )
    process = OwnedProcess([sys.executable, "-c", script], log_path=tmp_path / "log")
    pid = int(wait_for(process.log_tail, timeout_s=10, what="the grandchild"))
    process.stop()
    wait_for(lambda: not psutil.pid_exists(pid), timeout_s=5, what="the end of the grandchild")


def test_a_command_ends_with_its_guard(tmp_path: Path) -> None:
    process = OwnedProcess(SLEEP, log_path=tmp_path / "log")
    command = _command_of(process)
    os.kill(process._guard.pid, signal.SIGKILL)
    wait_for(lambda: _has_ended(command), timeout_s=5, what="the end of the command")


def test_processes_and_folders_end_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "owned"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert owner.stdout is not None
    guard = psutil.Process(int(owner.stdout.readline()))
    (command,) = wait_for(guard.children, timeout_s=10, what="the command")
    assert [path.name for path in folder.glob("mine-*/*")] == ["weights"]
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_for(lambda: _has_ended(command) and not any(folder.iterdir()), timeout_s=10, what="the end of all")


def test_an_owned_directory_goes_with_the_block_and_its_guard_too(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(KeyError), owned_directory(tmp_path, prefix="mine-") as folder:
        assert folder.parent == tmp_path
        (folder / "file").touch()
        raise KeyError
    assert not any(tmp_path.iterdir())
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_folder_has_one_user_until_that_one_ends_or_dies(tmp_path: Path) -> None:
    program = "import sys\nfrom pathlib import Path\nfrom slime.utils.processes import sole_user\n"
    program += "with sole_user(Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()\n"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(BlockingIOError), sole_user(tmp_path):
            pass
        other.kill()
        other.wait(10)
        with sole_user(tmp_path):
            with pytest.raises(BlockingIOError), sole_user(tmp_path):
                pass
    with sole_user(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_open_file_limit_becomes_the_hard_one() -> None:
    script = (
        "import resource; from slime.utils.processes import raise_open_file_limit;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512)); print(raise_open_file_limit());"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert output == "512\n(512, 512)\n"
    assert raise_open_file_limit() > 0
