"""What the `slime` command does before it has found its part."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slime.cli.main import COMMANDS, Command, main


def test_ctrl_c_while_a_command_is_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow_to_import.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(COMMANDS, "train", Command("slow_to_import", "a command"))
    monkeypatch.setattr(sys, "argv", ["slime", "train"])
    assert main() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_that_there_is_not_is_named_below_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["slime", "trian"])
    assert main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "error: there is no command 'trian'"
    assert all(any(line.split()[:1] == [name] for line in lines) for name in COMMANDS)
