"""The examples as they stand: a rollout of each with a real engine, and what a policy that plays well is taught."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.embedded_engine import EngineUnderTest, running_engine
from helpers.scripted_engine import Script, router_flags, scripted_engine

from examples.calculator.generate import calculate
from examples.gym_environment.environment import GuessNumber
from examples.prepare import prepare
from slime.arguments import Args, parse_args
from slime.rollout.data_source import RolloutDataSource
from slime.rollout.sglang_rollout import generate_rollout
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.async_utils import run
from slime.utils.http_utils import close
from slime.utils.types import Sample

ROOT = Path(__file__).parents[2]
NAMES = ["calculator", "self_correction", "gym_environment", "openai_agent"]
END = "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EngineUnderTest]:
    with running_engine(folder / "model", "--num-threads", "1") as running:
        yield running
        run(close())


def settings(name: str, folder: Path, flags: list[str]) -> Args:
    files = ["--hf-checkpoint", str(folder / "model"), "--prompt-data", str(folder / "prompts.jsonl")]
    return parse_args(["--config", str(ROOT / "examples" / name / "run.yaml"), *files, *flags])


def rolled(args: Args) -> list[Sample]:
    output = generate_rollout(args, 0, RolloutDataSource(args))
    return [sample for group in output.samples for sample in group]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_gives_samples_that_can_be_trained_on(name: str, folder: Path, engine: EngineUnderTest) -> None:
    args = settings(name, folder, router_flags(engine.url))
    samples = rolled(args)
    assert len(samples) == 16
    for sample in samples:
        sample.check()
        assert 0 < sample.effective_response_length <= sample.response_length
        assert sample.rollout_log_probs is not None
        assert isinstance(sample.get_reward_value(args), float)


def played(name: str, folder: Path, script: Script, *flags: str) -> tuple[Any, list[Sample]]:
    """The samples of one prompt with a policy that says what `script` says, and the texts that are trained on."""
    with scripted_engine(tokenizer_of(settings(name, folder, [])), script) as (_, through):
        args = settings(name, folder, [*through, "--rollout-batch-size", "1", "--global-batch-size", "4", *flags])
        return tokenizer_of(args), rolled(args)


def trained_text(tokenizer: Any, sample: Sample) -> str:
    response = sample.tokens[-sample.response_length :]
    mask = sample.loss_mask or [1] * len(response)
    return str(tokenizer.decode([token for token, flag in zip(response, mask, strict=True) if flag]))


def question(text: str) -> str:
    return text.split("<|im_start|>user\n")[1].split("=")[0]


def test_a_second_answer_that_is_right_earns_all(folder: Path) -> None:
    def doubts(text: str) -> str:
        return calculate(question(text)) if "Are you sure?" in text else "7"

    tokenizer, samples = played("self_correction", folder, doubts)
    assert [sample.reward for sample in samples] == [1.0] * 4
    assert trained_text(tokenizer, samples[0]) == f"7{END}{samples[0].label}{END}"


def test_a_player_who_halves_the_range_finds_the_number(folder: Path) -> None:
    def player(text: str) -> str:
        low, high = 0, 99
        for turn in text.split("<|im_start|>assistant\n")[1:-1]:
            guess = int(turn.split(END)[0])
            low, high = (guess + 1, high) if "higher" in turn else (low, guess - 1)
        return str((low + high) // 2)

    tokenizer, samples = played("gym_environment", folder, player)
    moves = [int(guess) for guess in trained_text(tokenizer, samples[0]).split(END) if guess]
    assert moves[0] == 49 and 1 <= len(moves) <= 4
    game = GuessNumber()
    game.reset(seed=0)
    assert samples[0].reward == pytest.approx(sum(game.step(str(move)).reward for move in moves))
    assert samples[0].non_generation_time > 0


def test_an_agent_that_is_told_it_was_wrong_tries_again(folder: Path) -> None:
    def learner(text: str) -> str:
        return calculate(question(text)) if "That is wrong." in text else "0"

    tokenizer, samples = played("openai_agent", folder, learner)
    assert [sample.reward for sample in samples] == [0.75] * 4
    assert trained_text(tokenizer, samples[0]) == f"0{END}{samples[0].label}{END}"


@pytest.mark.parametrize(
    ("expression", "value"), [("12+30", "42"), ("2*(3-5)", "-4"), ("1/2", "error"), ("9**9**9", "error"), ("", "error")]
)
def test_the_calculator_calculates_and_nothing_else(expression: str, value: str) -> None:
    assert calculate(expression) == value


def test_the_result_of_a_call_is_put_behind_it_and_not_trained_on(folder: Path) -> None:
    def caller(text: str) -> str:
        return "42!" if "<result>" in text else "<calc>12+30</calc>"

    tokenizer = tokenizer_of(settings("calculator", folder, []))
    with scripted_engine(tokenizer, caller, stop="</calc>") as (_, through):
        args = settings("calculator", folder, [*through, "--rollout-batch-size", "1", "--global-batch-size", "4"])
        samples = rolled(args)
    assert samples[0].response == f"<calc>12+30</calc><result>42</result>42!{END}"
    assert trained_text(tokenizer, samples[0]) == f"<calc>12+30</calc>42!{END}"
