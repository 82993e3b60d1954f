"""Runs of `slime train` as a user starts them: processes of their own, with a mark that all their children inherit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[4]
PLUGINS = Path(__file__).parents[1] / "plugins"
MARK = "SLIME_TEST_RUN"
KEEP_ENVIRONMENT = {"SPT_NOENV": "1"}  # setproctitle, which Ray uses, would else write over what a process inherited
ENGINE = "slime.engine.embedded.server"
TRAIN = ("-m", "slime.cli.main", "train")
TRAIN_ASYNC = (str(ROOT / "train_async.py"),)
ROUTER = "sglang::router"  # the name it gives itself
TRAINER = "ray::TrainActor"
POLL_S = 0.05


def wait_for(condition: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    """The first true value of `condition()`. Raises TimeoutError, saying `what` was waited for."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")
        pause.wait(POLL_S)
    return value


@dataclass
class Run:
    """One `slime train` process, its files, and the processes it started."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    weights_root: Path
    log: Path
    mark: str

    def wait(self, timeout_s: float = 150.0) -> int:
        """Its exit code. Raises TimeoutError with the output so far."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the run did not end within {timeout_s:g} s. Its output:\n{self.output()}") from error

    def output(self) -> str:
        """What it printed so far, both streams."""
        return self.log.read_text(errors="replace")

    def succeeds(self, timeout_s: float = 150.0) -> Run:
        """Wait for exit code 0."""
        code = self.wait(timeout_s)
        assert code == 0, f"exit code {code}:\n{self.output()}"
        return self

    def metrics(self, axis: str = "rollout/step") -> list[dict[str, float]]:
        """The metrics of an axis, one dict a step."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [record["metrics"] for record in map(json.loads, lines) if record["axis"] == axis]

    def samples(self, rollout_id: int) -> list[dict[str, Any]]:
        """What the recorder plug-in wrote down of a rollout."""
        samples: list[dict[str, Any]] = json.loads((self.run_dir / f"record_{rollout_id:06d}.json").read_text())
        return samples

    def reaches(self, path: str, timeout_s: float = 120.0) -> Run:
        """Wait until a path below the run directory, a glob pattern, exists. Raises where the run ends before."""

        def is_there() -> bool:
            found = any(self.run_dir.glob(path))
            assert found or self.process.poll() is None, f"the run ended before {path} was there:\n{self.output()}"
            return found

        wait_for(is_there, timeout_s=timeout_s, what=f"{path} of the run")
        return self

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Living processes of this run, itself included, with `part` in their command line; no guards of others."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(MARK) != self.mark:
                    continue
                command = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if part in command and not (part and "process_guard" in command):
                found.append(process)
        return found

    def the_process(self, part: str) -> psutil.Process:
        """The one process of this run with `part` in its command line, once there is one: Ray renames its workers."""

        def only() -> list[psutil.Process]:
            found = self.processes(part)
            return found if len(found) == 1 else []

        (process,) = wait_for(only, timeout_s=10.0, what=f"one process {part}")
        return process

    def leaves_nothing(self, within_s: float = 30.0) -> None:
        """No process and no weights are left after `within_s` seconds."""
        try:
            wait_for(lambda: not self.processes(), timeout_s=within_s, what="the end of all processes")
        except TimeoutError as error:
            raise AssertionError(f"left: {[process.cmdline() for process in self.processes()]}") from error
        assert list(self.weights_root.iterdir()) == []

    def kill(self) -> None:
        """SIGKILL for all that is left, for the end of a test."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@dataclass
class Starter:
    """Starts runs in `folder`, with defaults of a tiny model, and ends them with the test."""

    folder: Path
    model: Path
    prompts: Path
    weights_root: Path
    runs: list[Run] = field(default_factory=list)

    def __call__(
        self, *flags: str, cwd: Path | None = None, name: str = "run", command: Sequence[str] = TRAIN, **env: str
    ) -> Run:
        """Start `slime train` with the default flags and `flags` after them."""
        return self.bare(*self.default_flags(name), *flags, cwd=cwd, name=name, command=command, **env)

    def bare(
        self, *flags: str, cwd: Path | None = None, name: str = "run", command: Sequence[str] = TRAIN, **env: str
    ) -> Run:
        """Start `slime train`, or another Python command, with `flags` only."""
        mark = uuid.uuid4().hex
        python_path = os.pathsep.join([str(ROOT), str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])])
        log = self.folder / f"{name}_{len(self.runs)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command, *flags],
                cwd=cwd or self.folder,
                env={**os.environ, "PYTHONPATH": python_path, **KEEP_ENVIRONMENT, MARK: mark, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        run = Run(process, self.folder / name, self.weights_root, log, mark)
        self.runs.append(run)
        return run

    def default_flags(self, name: str) -> list[str]:
        """A colocated run of 2 rollouts, 2 prompts x 4 samples of 8 tokens."""
        settings = {
            "--train-backend": "fsdp",
            "--hf-checkpoint": str(self.model),
            "--prompt-data": str(self.prompts),
            "--input-key": "prompt",
            "--label-key": "label",
            "--rollout-batch-size": "2",
            "--n-samples-per-prompt": "4",
            "--num-rollout": "2",
            "--actor-num-gpus-per-node": "1",
            "--rollout-max-response-len": "8",
            "--max-tokens-per-gpu": "512",
            "--num-threads": "1",
            "--lr": "1e-3",
            "--rollout-function-path": "recorder.generate_rollout",
            "--custom-rm-path": "recorder.no_threes",
            "--rollout-health-check-interval": "0.5",
            "--update-weight-disk-dir": str(self.weights_root),
            "--run-dir": str(self.folder / name),
        }
        flags = [part for item in settings.items() for part in item]
        return [*flags, "--colocate", "--use-dynamic-batch-size", "--apply-chat-template"]

    def end(self) -> None:
        """End all runs."""
        for run in self.runs:
            run.kill()
