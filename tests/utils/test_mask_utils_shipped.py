"""Loss masks under the chat templates that Qwen and DeepSeek-R1-Distill-Qwen are shipped with."""

from __future__ import annotations

from typing import Any

import pytest

from slime.utils.mask_utils import MultiTurnLossMaskGenerator
from tests.helpers.qwen_templates import shipped_tokenizer

SYSTEM = {"role": "system", "content": "be kind"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "sum", "parameters": {"type": "object"}}}]
EMPTY, HM, END = "<think>\n\n</think>\n\n", "<think>\nhm\n</think>\n\n", "<|im_end|>"
NO_THINKING = {"enable_thinking": False}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def calls(*names: str, content: Any = "", arguments: Any = None, **fields: Any) -> dict[str, Any]:
    functions = [{"name": name, "arguments": arguments or {"x": 1}} for name in names]
    return said(content, tool_calls=[{"type": "function", "function": one} for one in functions], **fields)


def call_text(*names: str) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {{"x": 1}}}}\n</tool_call>' for name in names)


TALK = [user("q1"), said("a1"), user("q2"), said("a2")]
TOOL_TALK = [
    SYSTEM, user("q1"), calls("add", "sub"), result("1"), result("2"), calls("mul", content="then"), result("3"),
    said("done"), user("q2"), said("bye"),
]  # fmt: skip
TOOL_TEXTS = [call_text("add", "sub"), f"then\n{call_text('mul')}", "done"]
ONE_QUESTION = [
    user("q1"), calls("add", reasoning_content="r1"), result("1"), result("2"), calls("sub", content=None),
    result("3"), said(HM + "done"),
]  # fmt: skip

# template, family, template variables, messages, what is trained on (each turn's end token left out here)
CASES: dict[str, tuple[str, str, dict[str, Any], list[Any], list[str]]] = {
    "qwen2.5": ("qwen2_5", "qwen", {}, TALK, ["a1", "a2"]),
    "qwen2.5 tools": ("qwen2_5", "qwen", {}, TOOL_TALK, [*TOOL_TEXTS, "bye"]),
    "qwen2.5 line breaks": (
        "qwen2_5", "qwen", {}, [user("q"), said("\n\na\n"), user("thanks")], ["\n\na\n"]
    ),
    "qwen3 instruct": ("qwen3_instruct_2507", "qwen", {}, [SYSTEM, *TALK], ["a1", "a2"]),
    "qwen3 instruct tools": ("qwen3_instruct_2507", "qwen", {}, TOOL_TALK, [*TOOL_TEXTS, "bye"]),
    "qwen3": ("qwen3", "qwen3", {}, TALK, ["a1", EMPTY + "a2"]),
    "qwen3 reasoning": ("qwen3", "qwen3", {}, [*TALK[:3], said(HM + "a2")], ["a1", HM + "a2"]),
    "qwen3 reasoning field": ("qwen3", "qwen3", {}, [*TALK[:3], said("a2", reasoning_content="hm")], ["a1", HM + "a2"]),
    "qwen3 tools": ("qwen3", "qwen3", {}, TOOL_TALK, [*TOOL_TEXTS, EMPTY + "bye"]),
    "qwen3 one question": (
        "qwen3", "qwen3", {}, ONE_QUESTION,
        [f"<think>\nr1\n</think>\n\n{call_text('add')}", call_text("sub"), HM + "done"],
    ),
    "qwen3 told tool results": (
        "qwen3", "qwen3", {},
        [user("q"), said(HM + "a1"), user("<tool_response>1</tool_response>"), said("a2")], [HM + "a1", EMPTY + "a2"],
    ),
    "qwen3 no thinking": ("qwen3", "qwen3", NO_THINKING, TALK, ["a1", "a2"]),
    "qwen3 no thinking tools": ("qwen3", "qwen3", NO_THINKING, TOOL_TALK, [*TOOL_TEXTS, "bye"]),
    "qwen3.5": ("qwen3_5_think", "qwen3_5", {}, [*TALK[:3], said(HM + "a2")], ["a1", "hm\n</think>\n\na2"]),
    "qwen3.5 no thinking": ("qwen3_5_think", "qwen3_5", NO_THINKING, TALK, ["a1", "a2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_exactly_the_assistant_turns_are_trained_on_and_the_tokens_are_the_tokenizers_own(
    case: str, tools: list[Any] | None
) -> None:
    template, family, variables, messages, texts = CASES[case]
    tokenizer = shipped_tokenizer(template)
    generator = MultiTurnLossMaskGenerator(tokenizer, family, variables)
    token_ids, loss_mask = generator.get_loss_mask(messages, tools=tools)
    assert generator.get_text_from_loss_mask(token_ids, loss_mask) == [text + END for text in texts]
    own = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, **variables)
    if case != "qwen3.5":  # its generation prompt ends within a token
        assert token_ids == own
    assert tokenizer.decode(token_ids) == tokenizer.decode(own)


@pytest.mark.parametrize("case", CASES)
def test_the_last_turn_stands_where_generation_would_begin(case: str) -> None:
    template, family, variables, messages, _ = CASES[case]
    tokenizer = shipped_tokenizer(template)
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    prompt_ids = tokenizer.apply_chat_template(
        messages[:last], tokenize=True, add_generation_prompt=True, return_dict=False, **variables
    )
    before = [{**message, "step_loss_mask": 0} for message in messages[:last]]
    token_ids, loss_mask = MultiTurnLossMaskGenerator(tokenizer, family, variables).get_loss_mask(
        [*before, *messages[last:]]
    )
    assert (token_ids[: len(prompt_ids)], loss_mask.index(1)) == (prompt_ids, len(prompt_ids))


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_instruct_2507"])
@pytest.mark.parametrize("messages", [TALK, TOOL_TALK, [SYSTEM, *TALK, user("q3")]])
def test_the_mask_is_that_of_a_template_that_marks_what_is_generated(template: str, messages: list[Any]) -> None:
    tokenizer = shipped_tokenizer(template)
    generator = MultiTurnLossMaskGenerator(tokenizer, "qwen")
    token_ids, loss_mask = generator.get_loss_mask(messages)
    marked = shipped_tokenizer(f"{template}_training").apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert token_ids == marked["input_ids"]
    assert all(theirs >= ours for ours, theirs in zip(loss_mask, marked["assistant_masks"], strict=True))
    extra = [
        tokenizer.decode([token_id])
        for token_id, ours, theirs in zip(token_ids, loss_mask, marked["assistant_masks"], strict=True)
        if theirs > ours
    ]
    assert set(extra) == {"\n"}  # theirs has the line breaks around a turn, which nobody samples


@pytest.mark.parametrize("content", [HM + "a2", "hm\n</think>\n\na2", "<think>hm\n</think>\n\na2"])
def test_distill_qwen_continues_the_opened_reasoning_of_the_last_turn(content: str) -> None:
    tokenizer = shipped_tokenizer("deepseek_r1_distill")
    messages = [SYSTEM, user("q1"), said(HM + "a1", step_loss_mask=0), user("q2"), said(content)]
    generator = MultiTurnLossMaskGenerator(tokenizer, "distill_qwen")
    token_ids, loss_mask = generator.get_loss_mask(messages)
    prompt_ids = tokenizer.apply_chat_template(
        messages[:4], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(prompt_ids).endswith("<｜Assistant｜><think>\n")
    answer_ids = tokenizer("hm\n</think>\n\na2<｜end▁of▁sentence｜>", add_special_tokens=False)["input_ids"]
    assert token_ids == prompt_ids + answer_ids
    assert loss_mask == [0] * len(prompt_ids) + [1] * len(answer_ids)


def test_distill_qwen_answers_a_tool_without_a_generation_prompt() -> None:
    tokenizer = shipped_tokenizer("deepseek_r1_distill")
    call = calls("add", content=None, arguments='{"x": 1}', step_loss_mask=0)
    messages = [user("q"), call, result("1"), said("done")]
    generator = MultiTurnLossMaskGenerator(tokenizer, "distill_qwen")
    token_ids, loss_mask = generator.get_loss_mask(messages)
    assert generator.get_text_from_loss_mask(token_ids, loss_mask) == ["done<｜end▁of▁sentence｜>"]
    clean = [{key: value for key, value in turn.items() if key != "step_loss_mask"} for turn in messages]
    assert token_ids == tokenizer.apply_chat_template(clean, tokenize=True, return_dict=False)


@pytest.mark.parametrize(
    ("template", "family", "variables", "messages", "reason"),
    [
        ("qwen3", "qwen3", {}, [user("q"), said(HM + "a"), *TALK], "message 1: .* drops part of its content"),
        ("qwen3", "qwen3", NO_THINKING, [user("q"), said(HM + "a")], "message 1: .* renders this turn differently"),
        ("qwen3", "qwen", {}, TALK, "message 1: .* renders this turn differently"),
        (
            "qwen2_5", "qwen", {}, [user("q"), said("a", reasoning_content="hm")],
            "message 1: .* drops part of its reasoning_content",
        ),
        (
            "deepseek_r1_distill", "distill_qwen", {}, [user("q"), said("a", reasoning_content="hm")],
            "message 1: .* drops part of its reasoning_content",
        ),
        (
            "deepseek_r1_distill", "distill_qwen", {},
            [user("q"), calls("add", content="so", step_loss_mask=0), result("1"), said("a")],
            "message 1: the chat template leaves out the call of 'add'",
        ),
        (
            "qwen3", "qwen3", {}, [user([{"type": "text", "text": "a question"}]), said("a")],
            "message 0: the chat template leaves out content given as a list",
        ),
        (
            "qwen2_5", "qwen", {}, [user("q"), calls("add", arguments='{"x": 1}')],
            "message 1: the chat template quotes the arguments of 'add'",
        ),
    ],
)  # fmt: skip
def test_what_a_template_loses_or_garbles_is_an_error_naming_the_message(
    template: str, family: str, variables: dict[str, Any], messages: list[Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        MultiTurnLossMaskGenerator(shipped_tokenizer(template), family, variables).get_loss_mask(messages)
