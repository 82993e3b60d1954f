"""A tiny model, prompts, and the means to start runs on them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cpu.helpers.runs import Starter
from tests.helpers.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 additions."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"{n}+{n + 1}=", "label": str(2 * n + 1)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def start(tmp_path: Path, model: Path, prompts: Path) -> Iterator[Starter]:
    """Starts runs; whatever is left of them ends with the test."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="slime-test-", dir=shm if shm.is_dir() else None) as weights_root:
        starter = Starter(tmp_path, model, prompts, Path(weights_root))
        yield starter
        starter.end()
