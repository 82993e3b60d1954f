"""How an engine refuses to start, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest
from helpers.embedded_engine import free_port, server_command
from helpers.tiny_models import make_tiny_model

TIMEOUT_S = 60.0


def refusal(model: Path, port: int, *flags: str) -> str:
    """The one line that a server which does not start leaves on stderr."""
    result = subprocess.run(
        server_command(model, port, "--log-level", "error", *flags), capture_output=True, timeout=TIMEOUT_S, check=False
    )
    assert result.returncode != 0
    lines = [line for line in result.stderr.decode().splitlines() if "error: " in line]
    assert len(lines) == 1, result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()
    return lines[0]


def test_a_port_in_use_is_named(tiny_model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refusal(tiny_model, port)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"--model-path {tmp_path / 'none'} is not a folder" in refusal(tmp_path / "none", free_port())
    assert "has no config.json" in refusal(tmp_path, free_port())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--mem-fraction-static", "2"], "--mem-fraction-static must lie between 0 and 1, got 2.0"),
        (["--max-running-requests", "0"], "--max-running-requests must be at least 1, got 0"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_a_bad_flag_is_named(tiny_model: Path, flags: list[str], expected: str) -> None:
    assert expected in refusal(tiny_model, free_port(), *flags)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    (model / "tokenizer.json").write_text("{ this is no tokenizer")
    assert f"the tokenizer in {model} cannot be loaded" in refusal(model, free_port())


def test_a_model_with_state_beyond_a_cache_is_refused(tmp_path: Path) -> None:
    types = ["linear_attention", "full_attention"]
    model = make_tiny_model(tmp_path / "model", layer_types=types)
    assert "linear_attention" in refusal(model, free_port())


def test_a_context_beyond_the_models_is_refused(tiny_model: Path) -> None:
    assert "--context-length 4000 exceeds the model's 2048" in refusal(
        tiny_model, free_port(), "--context-length", "4000"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_at_once(tiny_model: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        server_command(tiny_model, free_port()), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if b"serving " in line:
                break
        process.send_signal(number)
        process.wait(timeout=10)
    finally:
        process.kill()
        process.wait()
