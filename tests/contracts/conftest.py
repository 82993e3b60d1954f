"""The engine that the wire contract is checked against: our own by default, or a running one.

SLIME_ENGINE_URL and SLIME_ENGINE_MODEL (its checkpoint folder, a float32 Qwen3 made by `helpers.tiny_models`) name a
running engine, such as a real SGLang; SLIME_ENGINE_LACKS lists what it does not have, by the names that `needs` is
called with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.embedded_engine import EngineUnderTest, running_engine
from helpers.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    """The engine under test, with the weights of seed 0."""
    if url := os.environ.get("SLIME_ENGINE_URL"):
        yield EngineUnderTest(url, Path(os.environ["SLIME_ENGINE_MODEL"]), is_embedded=False)
        return
    model = make_tiny_model(tmp_path_factory.mktemp("models") / "first")
    with running_engine(model, "--random-seed", "0", "--num-threads", "1") as running:
        yield running


@pytest.fixture(scope="session")
def other_model(engine: EngineUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same shape with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "second", seed=1)


@pytest.fixture(scope="session")
def reference(engine: EngineUnderTest) -> PreTrainedModel:
    """The engine's model in transformers."""
    return load(engine.model_path)


@pytest.fixture(scope="session")
def other_reference(other_model: Path) -> PreTrainedModel:
    """The other checkpoint in transformers."""
    return load(other_model)


@pytest.fixture(scope="session")
def tokenizer(engine: EngineUnderTest) -> PreTrainedTokenizerBase:
    """The engine's tokenizer."""
    return AutoTokenizer.from_pretrained(engine.model_path)


@pytest.fixture
def needs(engine: EngineUnderTest) -> Callable[[str], None]:
    """Skips a test that needs what the engine lacks."""
    lacks = set() if engine.is_embedded else set(os.environ.get("SLIME_ENGINE_LACKS", "").split(","))

    def check(capability: str) -> None:
        if capability in lacks:
            pytest.skip(f"the engine at {engine.url} lacks: {capability}")

    return check


@pytest.fixture
def first_weights(engine: EngineUnderTest) -> Iterator[None]:
    """Puts the first weights back after a test that changes them."""
    yield
    engine.post("/continue_generation")
    answer = engine.post("/update_weights_from_disk", {"model_path": str(engine.model_path), "weight_version": "first"})
    assert answer.status == 200, answer.raw


def load(path: Path) -> PreTrainedModel:
    """A checkpoint in transformers, with its plainest attention."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
