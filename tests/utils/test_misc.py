from __future__ import annotations

import os.path
from pathlib import Path

import pytest

from slime.utils.misc import is_due, load_function


def test_a_dotted_path_names_an_attribute() -> None:
    assert load_function("os.path.join") is os.path.join


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("join", "plug-in path 'join' must be dotted"),
        ("no_such_module.f", r"plug-in 'no_such_module.f': cannot import 'no_such_module' .* PYTHONPATH"),
        ("os.path.no_such", r"plug-in 'os.path.no_such': module 'os.path' has no attribute 'no_such'"),
        ("os.no_such.f", "cannot import 'os.no_such'"),
        ("broken_plugin.f", "importing 'broken_plugin' raised SyntaxError: invalid syntax"),
        ("needy_plugin.f", "cannot import 'needy_plugin' .*No module named 'not_installed'"),
        ("os.path.", "plug-in path 'os.path.' must be dotted"),
        (".f", "plug-in path '.f' must be dotted"),
    ],
)
def test_a_path_that_does_not_load_says_why(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("def f(:\n")
    (tmp_path / "needy_plugin.py").write_text("import not_installed\n")
    with pytest.raises(ValueError, match=message):
        load_function(path)


@pytest.mark.parametrize(
    ("interval", "num_rollout", "due"),
    [
        (None, None, []),
        (None, 7, [6]),
        (1, None, [0, 1, 2, 3, 4, 5, 6]),
        (3, None, [2, 5]),
        (3, 7, [2, 5, 6]),
        (10, 7, [6]),
    ],
)
def test_what_is_due_after_which_rollout(interval: int | None, num_rollout: int | None, due: list[int]) -> None:
    assert [rollout_id for rollout_id in range(7) if is_due(rollout_id, interval, num_rollout)] == due
