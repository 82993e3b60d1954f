"""Messages of OpenAI's chat protocol: tool calls in a model's words, and whether two messages say the same."""

from __future__ import annotations

import json
import re
from typing import Any

from slime.utils.types import Message

# As Qwen's and Hermes' templates teach it: a JSON object with name and arguments between these tags.
_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def assistant_message(text: str, *, has_tools: bool) -> Message:
    """What the model said as a message; with tools its calls are taken out of the words.

    A call that is not valid JSON stays in the words, so that the agent sees it.
    """
    calls = [_tool_call(match) for match in _TOOL_CALL.finditer(text)] if has_tools else []
    if not calls or None in calls:
        return {"role": "assistant", "content": text}
    content = text[: text.index("<tool_call>")].strip()
    return {"role": "assistant", "content": content or None, "tool_calls": calls}


def _tool_call(match: re.Match[str]) -> dict[str, Any] | None:
    try:
        call = json.loads(match[1])
    except json.JSONDecodeError:
        return None
    if not isinstance(call.get("name"), str):
        return None
    arguments = json.dumps(call.get("arguments", {}))
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{match.start()}", "type": "function", "function": function}


def for_template(message: Message) -> Message:
    """A message as chat templates want it: text content, and the arguments of tool calls as objects."""
    clean = {key: value for key, value in message.items() if value is not None}
    clean["content"] = text_of(message)
    if clean.get("tool_calls"):
        clean["tool_calls"] = [{**call, "function": _with_object(call["function"])} for call in clean["tool_calls"]]
    return clean


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": _object(function.get("arguments"))}


def _object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments


def text_of(message: Message) -> str:
    """The words of a message, also where they come in parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def say_the_same(left: list[Message], right: list[Message]) -> bool:
    """Whether two conversations are equal in role, words and tool calls, whatever fields a client added."""
    return len(left) == len(right) and all(_essence(a) == _essence(b) for a, b in zip(left, right, strict=True))


def _essence(message: Message) -> tuple[Any, ...]:
    calls = [
        (call["function"].get("name"), _object(call["function"].get("arguments")))
        for call in message.get("tool_calls") or []
    ]
    return message.get("role"), text_of(message), calls, message.get("tool_call_id")
