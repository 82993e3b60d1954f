from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import plain_grpo
from helpers.embedded_engine import EngineUnderTest, running_engine
from helpers.tiny_models import make_tiny_model

from slime.rollout.on_policy_distillation import reward_func
from slime.utils.async_utils import run
from slime.utils.types import Sample


@dataclass(frozen=True)
class Settings:
    rm_url: str | None
    hf_checkpoint: str
    rollout_temperature: float = 0.7
    rm_timeout_s: float = 30.0
    rm_type: str | None = None
    trust_remote_code: bool = False
    sglang_model_routers: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    """Another model than the student's, with the same tokenizer."""
    directory = make_tiny_model(tmp_path_factory.mktemp("teacher"), seed=7, num_hidden_layers=1)
    with running_engine(directory) as engine:
        yield engine


@pytest.fixture
def settings(teacher: EngineUnderTest, tmp_path: Path) -> Settings:
    return Settings(f"{teacher.url}/generate", str(make_tiny_model(tmp_path)))


def sample() -> Sample:
    return Sample(index=0, tokens=[5, 6, 7, 8, 9, 10, 11], response_length=3, response="4", label="4")


def test_teacher_log_probs_are_those_of_the_teacher_alone(settings: Settings, teacher: EngineUnderTest) -> None:
    scored = sample()
    assert run(reward_func(settings, scored)) == 0.0
    expected = plain_grpo.response_log_probs(plain_grpo.load(teacher.model_path), scored, 0.7)
    assert scored.teacher_log_probs == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_served_model_named_teacher_is_the_teacher_where_no_address_is_given(settings: Settings) -> None:
    host, port = str(settings.rm_url).removeprefix("http://").removesuffix("/generate").split(":")
    served = dataclasses.replace(settings, rm_url=None, sglang_model_routers={"teacher": (host, int(port))})
    by_name, by_address = sample(), sample()
    run(reward_func(served, by_name))
    run(reward_func(settings, by_address))
    assert by_name.teacher_log_probs == by_address.teacher_log_probs


def test_the_rule_still_gives_the_reward(settings: Settings) -> None:
    with_rule = dataclasses.replace(settings, rm_type="exact_match")
    assert run(reward_func(with_rule, sample())) == 1.0


def test_a_teacher_with_another_tokenizer_is_an_error(settings: Settings, tmp_path: Path) -> None:
    """The same number of tokens, two of which have changed places."""
    text = (Path(settings.hf_checkpoint) / "tokenizer.json").read_text()
    other = tmp_path / "other"
    make_tiny_model(other)
    first, second = token_names(text, 8, 9)
    swapped = text.replace(f'"{first}":8', f'"{second}":8').replace(f'"{second}":9', f'"{first}":9')
    swapped = swapped.replace(f'"{first}": 8', f'"{second}": 8').replace(f'"{second}": 9', f'"{first}": 9')
    assert swapped != text
    (other / "tokenizer.json").write_text(swapped)
    mixed = dataclasses.replace(settings, hf_checkpoint=str(other))
    with pytest.raises(ValueError, match=r"has another tokenizer: token 8 is .* choose a teacher of the same family"):
        run(reward_func(mixed, sample()))


def token_names(text: str, *ids: int) -> list[str]:
    vocab = json.loads(text)["model"]["vocab"]
    by_id = {index: json.dumps(name)[1:-1] for name, index in vocab.items()}
    return [by_id[index] for index in ids]


def test_without_an_address_it_says_which_flag(settings: Settings) -> None:
    with pytest.raises(ValueError, match="needs --rm-url"):
        run(reward_func(dataclasses.replace(settings, rm_url=None), sample()))
