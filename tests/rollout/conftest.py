"""A tiny model and an engine that serves it, of each test file that asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.embedded_engine import EngineUnderTest, running_engine
from helpers.tiny_models import make_tiny_model

from slime.utils.async_utils import run
from slime.utils.http_utils import close


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Its longest context is the file's CONTEXT, or 256 tokens."""
    context = getattr(request.module, "CONTEXT", 256)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=context)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[EngineUnderTest]:
    with running_engine(model, "--num-threads", "1") as running:
        yield running
        run(close())
