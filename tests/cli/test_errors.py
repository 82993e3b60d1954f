"""What the user reads of a failure, and the exit code."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import pytest

from slime.cli.errors import reported_errors
from slime.config import ConfigError
from slime.data.files import read_rows
from slime.utils.http_utils import HTTPError
from slime.utils.processes import Terminated


def _report(error: BaseException, log_dir: Path | None = None) -> int:
    with reported_errors() as outcome:
        outcome.log_dir = log_dir
        raise error
    return outcome.code


def test_wrong_settings_are_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report(ConfigError("--config: run.yaml cannot be read:\n  line 3,\n  column 1.")) == 2
    assert capsys.readouterr().err == "error: --config: run.yaml cannot be read: line 3, column 1.\n"


@pytest.mark.parametrize(
    "error", [ValueError("bad line"), FileNotFoundError("bad line"), HTTPError("bad line", 400), OSError("bad line")]
)
def test_expected_errors_are_a_sentence_with_the_traceback_in_a_file(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _report(error, tmp_path) == 1
    shown, kept = capsys.readouterr().err.splitlines()
    assert shown.startswith("error: bad line")
    assert kept == f"(traceback: {tmp_path / 'error.log'})"
    assert "raise error\n" in (tmp_path / "error.log").read_text()


@pytest.mark.parametrize("error", [KeyError("oops"), RuntimeError("oops")])
def test_what_nobody_expected_shows_its_traceback_and_kind(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _report(error)
    output = capsys.readouterr().err
    assert code == 1
    assert output.startswith("Traceback (most recent call last):")
    assert output.splitlines()[-1].startswith(f"error: {error} ({type(error).__name__}")


def test_what_a_plug_in_raised_names_its_function_and_line_and_what_slime_raised_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(text):\n    return parse(text)\n\ndef parse(text):\n    return int(text)\n"
    )
    score = run_path(str(tmp_path / "mine.py"))["score"]
    with reported_errors():
        score("{")
    place = f"(ValueError in parse, {tmp_path / 'mine.py'}:5)"
    assert capsys.readouterr().err == f"error: invalid literal for int() with base 10: '{{' {place}\n"
    with reported_errors():
        list(read_rows(str(tmp_path / "nowhere.jsonl")))
    assert capsys.readouterr().err.rstrip().endswith("does not exist")


def test_ctrl_c_is_130_and_sigterm_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report(KeyboardInterrupt()) == 130
    assert _report(Terminated("nothing to save")) == 0
    assert capsys.readouterr().err == "interrupted\nnothing to save\n"


def test_a_run_directory_that_takes_no_file_does_not_hide_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "error.log").mkdir()
    assert _report(ValueError("bad line"), tmp_path) == 1
    shown, kept = capsys.readouterr().err.splitlines()
    assert shown.startswith("error: bad line")
    assert kept.startswith("(the traceback could not be written: ")
