from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import trl


@pytest.mark.parametrize(("folders", "is_hidden"), [(["cute"], True), (["cute", "ops"], False), ([], False)])
def test_a_flash_attn_without_its_ops_is_hidden(
    folders: list[str], is_hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in folders:
        (tmp_path / "flash_attn" / folder).mkdir(parents=True)
        (tmp_path / "flash_attn" / folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "flash_attn", object())  # what stands there afterwards is taken away again
    del sys.modules["flash_attn"]
    importlib.invalidate_caches()
    was_there = importlib.util.find_spec("flash_attn") is not None
    trl.hide_partial_flash_attn()
    assert (importlib.util.find_spec("flash_attn") is not None) == (was_there and not is_hidden)
    if is_hidden:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn.cute")
