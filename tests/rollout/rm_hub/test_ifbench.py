"""Instructions that can be checked: IFEval's here, others by a checkout of IFBench."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slime.rollout.rm_hub import RewardError, async_rm
from slime.rollout.rm_hub.ifeval import CHECKS, follows
from slime.utils.async_utils import run
from slime.utils.types import Sample

# instruction, its arguments, responses that follow it, responses that do not
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, ["A Cat, a dog."], ["a category, a dog"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, ["cat, Cat"], ["cat concat"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, ["cat"], ["cat cat"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, ["a train"], ["Rain!"]),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 2, "let_relation": "at least"}, ["Eve"], ["e"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, ["A b 3.5? C."], ["A 3.5"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb"], ["a\n\nb", "a***b***c"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["don't well-known"], ["a b c"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        ["First.\n\n**Then**, b."],
        ["Then.\n\nb", "a\n\nb\n\nThen"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] [city]"], ["[name] []"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\nP.S. b", "a\nPS: b"], ["a P.S. b"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n- b"], ["* a", "**a**\n* b", "* a\n* b\n* c"]),
    ("detectable_format:constrained_response", {}, ["My answer is no."], ["No."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b**"], ["*a* ** **"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1 a\nSection 2 b"],
        ["Section 1 a Section"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["{a: 1}", 'x {"a": 1}']),
    ("detectable_format:title", {}, ["<<On cats>>\nThey sleep."], ["<< >> a", "<cats>"]),
    ("combination:two_responses", {}, ["a ****** b"], ["a", "a ****** a", "a ****** b ****** c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, ["say it\nIt."], ["It. Say it"]),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, ["So. any questions?\n"], ["Any questions? Ask."]),
    ("startend:quotation", {}, ['"a b"'], ['"a" b', '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["THE end OF it"],
        ["The END"],
    ),
    ("change_case:english_capital", {}, ["HELLO, 2."], ["Hello", "2."]),
    ("change_case:english_lowercase", {}, ["hello, 2."], ["Hello"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


@pytest.mark.parametrize(("instruction", "arguments", "right", "wrong"), CASES)
def test_an_instruction_tells_responses_that_follow_it(
    instruction: str, arguments: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    assert [follows(instruction, response, {**arguments, "unused": None}) for response in right] == [True] * len(right)
    assert [follows(instruction, response, arguments) for response in wrong] == [False] * len(wrong)
    assert not follows(instruction, " \n", arguments)


def test_every_instruction_is_tried_here() -> None:
    assert {case[0] for case in CASES} == CHECKS.keys()


@dataclass(frozen=True)
class RewardArgs:
    rm_type: str = "ifbench"
    custom_rm_path: str | None = None
    rm_timeout_s: float = 60.0
    rm_num_workers: int | None = 2


def score(response: str, **metadata: Any) -> Any:
    return run(async_rm(RewardArgs(), Sample(index=7, prompt="p", response=response, metadata=metadata)))


def test_the_reward_is_one_where_every_instruction_is_followed() -> None:
    both = {"instruction_id_list": ["punctuation:no_comma", "keywords:existence"], "kwargs": [{}, {"keywords": ["a"]}]}
    assert score("a b", **both) == 1.0
    assert score("a, b", **both) == 0.0
    assert score("b", **both) == 0.0


REGISTRY = """
class Count:
    def __init__(self, name): self.name = name
    def build_description(self, **arguments): self.__dict__.update(arguments)
    def get_instruction_args(self): return {"prompt": None}
    def check_following(self, response): return len(response) == self.length and self.prompt == "p"
INSTRUCTION_DICT = {"count:letters": Count}
"""


def test_instructions_of_ifbench_are_checked_by_its_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "instructions_registry.py").write_text(REGISTRY)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    metadata = {"instruction_id_list": ["count:letters"], "kwargs": [{"length": 3, "unused": None}]}
    assert [score("abc", **metadata), score("ab", **metadata)] == [1.0, 0.0]
    with pytest.raises(RewardError, match="neither IFEval nor the IFBench on PYTHONPATH knows .*'count:words'"):
        score("abc", instruction_id_list=["count:words"])


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "metadata\\['instruction_id_list'\\] must be a list of instructions"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "1 instructions but 2 entries"),
        ({"instruction_id_list": ["keywords:existence"]}, "'keywords:existence' cannot be checked with {}"),
        ({"instruction_id_list": ["count:letters"]}, "'count:letters' is none of IFEval's, and instructions_registry"),
    ],
)
def test_instructions_that_cannot_be_checked_fail_the_sample_by_name(metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(RewardError, match=f"sample 7: .*{reason}"):
        score("a b", **metadata)
