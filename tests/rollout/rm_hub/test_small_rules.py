"""The rules deepscaler, f1 and gpqa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from slime.rollout.rm_hub import RewardError, async_rm
from slime.rollout.rm_hub.f1 import f1_score
from slime.rollout.rm_hub.gpqa import chosen_letter
from slime.utils.async_utils import run
from slime.utils.types import Sample


@dataclass(frozen=True)
class RewardArgs:
    rm_type: str
    custom_rm_path: str | None = None
    rm_timeout_s: float = 60.0


def score(rule: str, response: str, label: str | None, **metadata: Any) -> Any:
    return run(async_rm(RewardArgs(rule), Sample(index=7, response=response, label=label, metadata=metadata)))


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"<think>\boxed{1}</think> so \boxed{\frac{1}{2}}", 1.0),
        (r"hm ###Response \boxed{0.5}", 1.0),
        (r"<think>is it \boxed{0.5}?</think> I cannot say", 0.0),
        (r"<think>so \boxed{0.5}", 0.0),
        ("<think>so</think> 0.5", 0.0),
        (r"<think>so</think> \boxed{2}", 0.0),
    ],
)
def test_deepscaler_scores_the_boxed_answer_behind_the_reasoning(response: str, reward: float) -> None:
    assert score("deepscaler", response, "0.5") == reward


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("the Eiffel tower, Paris", "Eiffel Tower", 0.8),
        ("Eiffel Tower", "An Eiffel Tower!", 1.0),
        ("no no no", "no", 0.5),
        ("Berlin", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("The", "a", 1.0),
    ],
)
def test_f1_is_the_harmonic_mean_of_shared_words(answer: str, label: str, expected: float) -> None:
    assert f1_score(answer, label) == pytest.approx(expected)


def test_f1_of_what_stands_in_the_box() -> None:
    assert score("boxed_f1", r"I think of many cities, \boxed{Paris}", "Paris") == 1.0
    assert score("f1", r"I think of many cities, \boxed{Paris}", "Paris") < 0.5


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("**Answer: C**", "C"),
        ("**Answer:** C", "C"),
        ("The correct option is **D**", "D"),
        (r"so \boxed{A}", "A"),
        (r"so $\boxed{\text{B}}$", "B"),
        (r"The answer is $\boxed{C}$", "C"),
        ("A looks good.\nB", "B"),
        ("(C)", "C"),
        ("First I thought the answer is A. No: the answer is D.", "D"),
        ("Answer: A\nThe answer is Einstein's", "A"),
        ("The answer is A quite often", "A"),
        ("The answer is Brussels", ""),
        ("Answer: E", ""),
        ("a cat", ""),
        ("", ""),
    ],
)
def test_the_choice_is_the_last_letter_that_is_declared(response: str, letter: str) -> None:
    assert chosen_letter(response, "ABCD") == letter


def test_gpqa_takes_a_letter_or_the_text_of_a_choice_as_label() -> None:
    assert score("gpqa", "The answer is B", "b") == 1.0
    assert score("gpqa", "The answer is B", "A") == 0.0
    assert score("gpqa", "The answer is B", "42", choices=["41", "42"]) == 1.0
    assert score("gpqa", "The answer is E", "E", valid_letters=["A", "E"]) == 1.0


def test_gpqa_refuses_a_label_that_is_no_choice() -> None:
    with pytest.raises(RewardError, match="sample 7: the label '43' is none of the letters AB nor of the choices"):
        score("gpqa", "The answer is B", "43", choices=["41", "42"])
    with pytest.raises(RewardError, match="sample 7: the sample has no label"):
        score("gpqa", "The answer is B", None)
