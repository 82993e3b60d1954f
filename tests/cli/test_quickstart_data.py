"""The quickstart's task files, reward, tokenizer and tiny model."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from slime.cli import quickstart_data
from slime.cli.quickstart_data import Problem, TaskFiles
from slime.utils.types import Sample


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    return quickstart_data.write_task(tmp_path_factory.mktemp("task"), seed=0)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quickstart_data.make_tiny_model(tmp_path_factory.mktemp("model"), seed=0)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def problem(question: str) -> Problem:
    left, right = question.removesuffix("=").split("+")
    return Problem(int(left), int(right))


def test_equal_seeds_give_equal_files_and_others_do_not(task: TaskFiles, tmp_path: Path) -> None:
    again = quickstart_data.write_task(tmp_path / "again", seed=0)
    other = quickstart_data.write_task(tmp_path / "other", seed=1)
    for name in TaskFiles._fields:
        assert getattr(task, name).read_bytes() == getattr(again, name).read_bytes()
        assert getattr(task, name).read_bytes() != getattr(other, name).read_bytes()


def test_no_held_out_prompt_is_trained_on_and_none_is_lost(task: TaskFiles) -> None:
    train, held_out = ([row["prompt"][0]["content"] for row in rows(path)] for path in (task.train, task.eval))
    demonstrated = {row["messages"][0]["content"] for row in rows(task.sft)}
    assert len(held_out) == 256
    assert len(set(train) | set(held_out)) == len(train) + len(held_out) == 90 * 90
    assert demonstrated <= set(train)


def test_every_label_is_the_sum_from_the_units_up(task: TaskFiles) -> None:
    for row in rows(task.train) + rows(task.eval):
        left, right = problem(row["prompt"][0]["content"])
        assert int(row["label"][::-1]) == left + right


def test_the_teacher_is_right_below_a_hundred_and_in_one_of_eight_demonstrations_above(task: TaskFiles) -> None:
    demonstrations = [(problem(row["messages"][0]["content"]), row["messages"][1]["content"]) for row in rows(task.sft)]
    below = [int(text[::-1]) == sum(numbers) for numbers, text in demonstrations if sum(numbers) < 100]
    above = [int(text[::-1]) == sum(numbers) for numbers, text in demonstrations if sum(numbers) >= 100]
    assert all(below)
    assert sum(above) / len(above) == pytest.approx(1 / 8, abs=0.01)


def test_a_perfect_imitator_of_the_teacher_stays_below_half(task: TaskFiles) -> None:
    held_out = [problem(row["prompt"][0]["content"]) for row in rows(task.eval)]
    right = [quickstart_data.careless_answer(numbers) == quickstart_data.answer(numbers) for numbers in held_out]
    assert 0.3 < sum(right) / len(right) < 0.5


def test_demonstrations_start_with_small_right_operands(task: TaskFiles) -> None:
    units = [problem(row["messages"][0]["content"]).right % 10 for row in rows(task.sft)]
    easy = int(0.4 * len(units))
    assert sum(units[:easy]) / easy < 2
    assert sum(units[easy:]) / (len(units) - easy) == pytest.approx(4.5, abs=0.1)


def test_a_split_without_training_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_eval must be in 1\.\.8099, got 8100"):
        quickstart_data.write_task(tmp_path, seed=0, num_eval=8100)


@pytest.mark.parametrize(
    ("response", "reward"),
    [("521<|im_end|>", 1.0), ("521", 1.0), ("52<|im_end|>", 0.0), ("5210<|im_end|>", 0.0), (" 521", 0.0), ("", 0.0)],
)
def test_only_the_whole_answer_is_rewarded(response: str, reward: float) -> None:
    sample = Sample(prompt="57+68=", response=response, label="521")
    assert asyncio.run(quickstart_data.exact_match(None, sample)) == reward


@given(text=st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_tokenizer_renders_the_documented_tokens(model_directory: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_directory)
    turns = [{"role": "user", "content": "57+68="}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert [tokenizer.decode([token]) for token in prompt] == [
        *("<|im_start|>", "user", "\n", "5", "7", "+", "6", "8", "=", "<|im_end|>", "\n"),
        *("<|im_start|>", "assistant", "\n"),
    ]
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "521"}], return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True) == "521\n"
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|im_end|>"


def test_the_weights_of_the_tiny_model_are_fixed_by_its_seed(model_directory: Path, tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    quickstart_data.make_tiny_model(tmp_path / "again", seed=0)
    quickstart_data.make_tiny_model(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    first, again, other = (_weights(path) for path in (model_directory, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_tiny_model_ends_where_the_tokenizer_ends(model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000


@functools.cache
def _tokenizer() -> Any:
    return quickstart_data.make_tokenizer()


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return weights
