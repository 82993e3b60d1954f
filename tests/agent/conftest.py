"""A tiny model, an engine that serves it, and settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.embedded_engine import EngineUnderTest, running_engine
from helpers.settings import run_args
from helpers.tiny_models import make_tiny_model

from slime.arguments import Args
from slime.utils.async_utils import run
from slime.utils.http_utils import close

MakeArgs = Callable[..., Args]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512)


@pytest.fixture(scope="session")
def engine(model: Path) -> Iterator[EngineUnderTest]:
    with running_engine(model, "--num-threads", "1") as running:
        yield running
        run(close())


@pytest.fixture
def make_args(model: Path, tmp_path: Path) -> MakeArgs:
    """Settings of a run of `model` with responses of at most 64 tokens, and what a test adds."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"input": [{"role": "user", "content": "2+3=?"}]}) + "\n")

    def make(*flags: str) -> Args:
        base = {"--rollout-batch-size": "1", "--rollout-max-response-len": "64"}
        return run_args(model, tmp_path / "prompts.jsonl", base, "--colocate", *flags)

    return make
