"""Text that grows token by token."""

from __future__ import annotations

import pytest
from helpers.tiny_models import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from slime.engine.embedded.text import GrowingText, StopChecker, decode, held_back

TOKENIZER = make_tokenizer()


def growing() -> GrowingText:
    return GrowingText(TOKENIZER, skip_special_tokens=True)


@given(st.text(min_size=1, max_size=30))
def test_text_grows_to_the_whole_and_only_by_whole_characters(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    stream = growing()
    seen = [stream.update(tokens[: count + 1]) for count in range(len(tokens))]
    assert seen[-1] == text
    assert all(text.startswith(part) for part in seen)


@given(st.lists(st.integers(0, 319), min_size=1, max_size=40))
def test_text_of_any_tokens_is_a_prefix_of_their_decoding(tokens: list[int]) -> None:
    stream = growing()
    for count in range(1, len(tokens) + 1):
        whole = decode(TOKENIZER, tokens[:count], skip_special_tokens=True)
        assert whole.startswith(stream.update(tokens[:count]))


def test_a_character_of_several_tokens_waits_for_the_last() -> None:
    tokens = TOKENIZER.encode("a€b")
    assert len(tokens) == 5
    stream = growing()
    assert [stream.update(tokens[: count + 1]) for count in range(5)] == ["a", "a", "a", "a€", "a€b"]


@pytest.mark.parametrize("stop", ["the answer", "er is", "wer", " is 4", "2"])
def test_a_stop_string_is_found_wherever_tokens_cut_it(stop: str) -> None:
    text = "so the answer is 42"
    checker = StopChecker(TOKENIZER, ["not there", stop], skip_special_tokens=True)
    tokens = TOKENIZER.encode(text)
    for count in range(1, len(tokens) + 1):
        matched = checker.check(tokens[:count])
        seen = TOKENIZER.decode(tokens[:count])
        assert matched == (stop if stop in seen else None)
        if matched:
            return
    pytest.fail("the stop string was not found")


@pytest.mark.parametrize(
    ("text", "stop", "count"),
    [("abc", ["cd"], 1), ("abc", ["bcd", "cx"], 2), ("abc", ["abc"], 0), ("abc", [], 0), ("ab", ["zz"], 0)],
)
def test_what_may_begin_a_stop_string_is_held_back(text: str, stop: list[str], count: int) -> None:
    assert held_back(text, stop) == count
