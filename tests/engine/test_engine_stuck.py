"""An engine whose thread is stuck says so, while its event loop still answers."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.embedded_engine import running_engine

from slime.engine.embedded.app import Server
from slime.engine.embedded.args import ServerArgs
from slime.engine.embedded.scheduler import Scheduler

TIMEOUT_S = 60.0


def status(url: str, body: dict[str, object] | None = None) -> tuple[int, str]:
    """Status and text of an answer."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(url, data=data, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_for_status(url: str, expected: int) -> str:
    """The text of the first answer of that status."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        code, text = status(url)
        if code == expected:
            return text
        assert time.monotonic() < deadline, f"{url} answers {code}, not {expected}"


@contextmanager
def serving(model: Path, watchdog_timeout: float) -> Iterator[str]:
    """A server in a thread of this process: its address."""
    before = torch.get_num_threads()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        args = ServerArgs(
            model_path=str(model), max_total_tokens=1024, watchdog_timeout=watchdog_timeout, log_level="error"
        )
        server = Server(args)
        listener.listen()
        thread = threading.Thread(target=server.run, args=(listener,))
        thread.start()
        try:
            yield url
        finally:
            server._uvicorn.should_exit = True
            thread.join(TIMEOUT_S)
            torch.set_num_threads(before)


def test_a_step_that_does_not_end_makes_health_answer_503(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked, step = threading.Event(), Scheduler.step

    def stuck(scheduler: Scheduler) -> None:
        assert blocked.wait(TIMEOUT_S)
        step(scheduler)

    monkeypatch.setattr(Scheduler, "step", stuck)
    body: dict[str, object] = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
    answers: list[tuple[int, str]] = []
    with serving(tiny_model, watchdog_timeout=0.5) as url:
        assert status(f"{url}/health")[0] == 200
        client = threading.Thread(target=lambda: answers.append(status(f"{url}/generate", body)))
        client.start()
        try:
            sentence = wait_for_status(f"{url}/health", 503)
            assert "the engine's thread is stuck" in sentence
            assert "--watchdog-timeout allows 0.5 s" in sentence
            assert status(f"{url}/health_generate")[0] == 503
        finally:
            blocked.set()
            client.join(TIMEOUT_S)
        assert answers[0][0] == 200
        wait_for_status(f"{url}/health", 200)


def test_an_engine_without_work_is_not_stuck_however_long_it_waits(tiny_model: Path) -> None:
    with serving(tiny_model, watchdog_timeout=1e-9) as url:
        wait_for_status(f"{url}/health", 200)
        assert [status(f"{url}/health")[0] for _ in range(20)] == [200] * 20


def test_a_step_takes_the_time_that_was_asked_for(tiny_model: Path) -> None:
    with running_engine(tiny_model, "--num-threads", "1", "--min-step-ms", "40") as engine:
        start = time.monotonic()
        engine.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 10, "ignore_eos": True})
        assert time.monotonic() - start >= 0.4
