"""Where the quickstart writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.cli.quickstart import new_directory
from slime.config import ConfigError
from slime.utils.processes import sole_user


def test_an_earlier_quickstart_is_replaced_and_anything_else_is_kept(tmp_path: Path) -> None:
    new_directory(tmp_path / "mine")
    (tmp_path / "mine" / "grpo").mkdir()
    new_directory(tmp_path / "mine")
    assert not (tmp_path / "mine" / "grpo").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other things"):
        new_directory(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("part", ["sft", "grpo"])
def test_a_quickstart_that_runs_is_left_alone(tmp_path: Path, part: str) -> None:
    new_directory(tmp_path)
    (tmp_path / part).mkdir()
    with sole_user(tmp_path / part), pytest.raises(ConfigError, match=r"--output .*: another quickstart runs there"):
        new_directory(tmp_path)
    assert (tmp_path / part).is_dir()
