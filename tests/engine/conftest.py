"""A loaded tiny model, shared by the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_models import make_tiny_model

from slime.engine.embedded.args import ServerArgs
from slime.engine.embedded.model_runner import ModelRunner
from slime.engine.embedded.server import make_matrix_products_reproducible

make_matrix_products_reproducible()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3."""
    return make_tiny_model(tmp_path_factory.mktemp("engine") / "qwen3")


@pytest.fixture(scope="session")
def runner(tiny_model: Path) -> ModelRunner:
    """The tiny model with room for 4096 tokens."""
    return ModelRunner(ServerArgs(model_path=str(tiny_model), max_total_tokens=4096))
