"""Fixtures of tests that train; a conftest imports them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_tiny_model
from helpers.training import world_of_one


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    torch.set_num_threads(1)
    with world_of_one():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one of the same shape."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)
