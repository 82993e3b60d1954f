"""Tool calls in a model's words, and what counts as the same message."""

from __future__ import annotations

import json

import pytest

from slime.agent.messages import assistant_message, for_template, say_the_same

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def test_tool_calls_are_taken_out_of_the_words() -> None:
    message = assistant_message(f"Let me see.\n{CALL}\n{CALL}", has_tools=True)
    assert message["content"] == "Let me see."
    first, second = message["tool_calls"]
    assert (first["type"], first["function"]["name"]) == ("function", "add")
    assert json.loads(first["function"]["arguments"]) == {"a": 2, "b": 3}
    assert first["id"] != second["id"]


def test_without_tools_a_call_is_only_words() -> None:
    assert assistant_message(CALL, has_tools=False) == {"role": "assistant", "content": CALL}


@pytest.mark.parametrize("broken", ['{"name": "add", "arguments": {}', '{"arguments": {}}', "{'name': 1}", "[1]"])
def test_a_broken_call_stays_in_the_words(broken: str) -> None:
    text = f"<tool_call>\n{broken}\n</tool_call>"
    assert assistant_message(text, has_tools=True) == {"role": "assistant", "content": text}


def test_messages_say_the_same_whatever_fields_a_client_adds() -> None:
    ours = [{"role": "user", "content": "hi"}, assistant_message(CALL, has_tools=True)]
    theirs = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": None},
        {**json.loads(json.dumps(ours[1])), "refusal": None, "audio": None},
    ]
    assert say_the_same(ours, theirs)
    assert say_the_same([for_template(message) for message in ours], theirs)
    assert not say_the_same(ours, theirs[:1])
    assert not say_the_same(ours, [{"role": "user", "content": "ho"}, theirs[1]])


def test_templates_get_the_arguments_of_a_call_as_an_object() -> None:
    clean = for_template(assistant_message(CALL, has_tools=True))
    assert clean["content"] == ""
    assert clean["tool_calls"][0]["function"]["arguments"] == {"a": 2, "b": 3}
