"""A running embedded engine for tests: its own process on a free port, and a small HTTP client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Answer:
    """An HTTP answer: its status, and its body as bytes or parsed."""

    status: int
    raw: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.raw)


@dataclass
class EngineUnderTest:
    """An engine that speaks the wire protocol. model_path: its checkpoint, also readable here."""

    url: str
    model_path: Path
    is_embedded: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 60.0
    pid: int = 0
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(128))

    def get(self, path: str) -> Answer:
        """GET, whatever the status."""
        return self._send(urllib.request.Request(self.url + path, headers=self.headers))

    def post(self, path: str, body: Any = None, *, raw: bytes | None = None) -> Answer:
        """POST of a JSON body, or of raw bytes, whatever the status."""
        return self._send(self._request(path, raw if raw is not None else json.dumps(body or {}).encode()))

    def generate(self, **body: Any) -> Any:
        """The answer of /generate, which must be 200."""
        answer = self.post("/generate", body)
        assert answer.status == 200, answer.raw
        return answer.json

    def start(self, **body: Any) -> Future[Any]:
        """`generate` in the background."""
        return self._pool.submit(lambda: self.generate(**body))

    def stream(self, path: str, body: Any) -> list[Any]:
        """All events of a streamed answer, without the closing [DONE], which must be there."""
        with urllib.request.urlopen(self._request(path, json.dumps(body).encode()), timeout=self.timeout_s) as answer:
            lines = [line[len(b"data: ") :].strip() for line in answer if line.startswith(b"data: ")]
        assert lines[-1] == b"[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def _request(self, path: str, data: bytes) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"} | self.headers
        return urllib.request.Request(self.url + path, data=data, headers=headers)

    def _send(self, request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                return Answer(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read())


def server_command(model_path: Path, port: int, *flags: str) -> list[str]:
    """The command line that starts an engine."""
    module = "slime.engine.embedded.server"
    return [sys.executable, "-m", module, "--model-path", str(model_path), "--port", str(port), *flags]


@contextmanager
def running_engine(
    model_path: Path, *flags: str, headers: dict[str, str] | None = None, port: int | None = None
) -> Iterator[EngineUnderTest]:
    """An engine in a process of its own, ended on leaving; an engine that does not come up fails with its log."""
    port = port or free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        server_command(model_path, port, *flags), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log: list[bytes] = []
    is_serving = threading.Event()
    reader = threading.Thread(target=_read_log, args=(process, log, is_serving), daemon=True)
    reader.start()
    engine = EngineUnderTest(f"http://127.0.0.1:{port}", model_path, headers=headers or {}, pid=process.pid)
    try:
        assert is_serving.wait(START_TIMEOUT_S) and process.poll() is None, b"".join(log).decode()
        yield engine
    finally:
        process.kill()
        process.wait()


def _read_log(process: subprocess.Popen[bytes], log: list[bytes], is_serving: threading.Event) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        log.append(line)
        if b"serving " in line:
            is_serving.set()
    is_serving.set()
