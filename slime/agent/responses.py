"""`/v1/responses`: its requests as turns of a session, and turns as its answers.

    instructions        a system message in front          function_call           a tool call of an assistant message
    message             a message                          function_call_output    a tool message

What was said up to a response is kept with the session, for `previous_response_id`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from slime.agent.session import MODEL_NAME, BadRequest, Session, Turn, TurnRequest
from slime.utils.types import Message

_TEXT_PARTS = ("input_text", "output_text", "text")
_CANNOT = ("background", "conversation", "prompt")


async def complete(session: Session, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request. Raises BadRequest, HTTPError."""
    _refuse_what_cannot_be_served(body)
    said = [*_earlier(session, body.get("previous_response_id")), *_messages(body.get("input"))]
    instructions = body.get("instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    tools = [_tool(tool) for tool in body.get("tools") or []]
    turn = await session.say(
        TurnRequest(
            messages=[*system, *said],
            tools=tools or None,
            max_tokens=body.get("max_output_tokens"),
        )
    )
    answer = _answer(turn, body)
    session.responses[answer["id"]] = [*said, turn.message]
    return answer


def events(answer: dict[str, Any]) -> Iterator[bytes]:
    """A whole answer as a stream: every item in one piece."""
    for number, event in enumerate(_events(answer)):
        event["sequence_number"] = number
        yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


# --- requests


def _refuse_what_cannot_be_served(body: dict[str, Any]) -> None:
    for name in _CANNOT:
        if body.get(name):
            raise BadRequest(f"{name} cannot be served: leave it out")
    if body.get("tool_choice") not in (None, "auto"):
        raise BadRequest("tool_choice must be 'auto': the policy decides by itself")
    text_format = ((body.get("text") or {}).get("format") or {}).get("type", "text")
    if text_format != "text":
        raise BadRequest(f"text.format must be 'text', {text_format!r} cannot be enforced")


def _earlier(session: Session, response_id: str | None) -> list[Message]:
    """What was said up to a response, without instructions, which hold for one request."""
    if response_id is None:
        return []
    if response_id not in session.responses:
        raise BadRequest(f"previous_response_id {response_id!r} is not a response of this session")
    return session.responses[response_id]


def _messages(value: Any) -> list[Message]:
    """`input` as messages; function calls join the assistant message in front of them."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRequest("input must be a string or a list of at least one item")
    messages: list[Message] = []
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise BadRequest(f"input item {number} must be an object")
        try:
            _add(item, messages)
        except KeyError as error:
            raise BadRequest(f"input item {number} lacks {error}") from error
        except BadRequest as error:
            raise BadRequest(f"input item {number}: {error}") from error
    return messages


def _add(item: dict[str, Any], messages: list[Message]) -> None:
    kind = item.get("type") or "message"
    if kind == "message":
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append({"role": role, "content": _text(item["content"])})
    elif kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
    else:
        raise BadRequest(f"type {kind!r} cannot be served, only message, function_call and function_call_output")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest("content must be a string or a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            raise BadRequest(f"content must be text, got {part!r:.80}")
    return "".join(part["text"] for part in content)


def _tool(tool: Any) -> dict[str, Any]:
    """A function tool as chat templates know it."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise BadRequest(f"tools must be functions, got {tool!r:.80}")
    known = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": known}


# --- answers


def _answer(turn: Turn, body: dict[str, Any]) -> dict[str, Any]:
    status = "incomplete" if turn.is_cut else "completed"
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if turn.is_cut else None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata") or {},
        "model": MODEL_NAME,
        "output": _items(turn.message, status),
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "tool_choice": "auto",
        "tools": body.get("tools") or [],
        "usage": {
            "input_tokens": turn.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": turn.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": turn.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": turn.num_prompt_tokens + turn.num_completion_tokens,
        },
    }


def _items(message: Message, status: str) -> list[dict[str, Any]]:
    """What the policy said: its words as one message, each of its calls as an item."""
    calls = message.get("tool_calls") or []
    items: list[dict[str, Any]] = []
    if message["content"] or not calls:
        part = {"type": "output_text", "text": message["content"], "annotations": []}
        items.append({"type": "message", "id": _new_id("msg"), "role": "assistant", "content": [part]})
    for call in calls:
        items.append({"type": "function_call", "id": _new_id("fc"), "call_id": call["id"], **call["function"]})
    return [item | {"status": status} for item in items]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _events(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    begun = answer | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(answer["output"]):
        empty: dict[str, Any] = {"content": []} if item["type"] == "message" else {"arguments": ""}
        begun_item = item | empty | {"status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": index, "item": begun_item}
        yield from _parts(item, {"item_id": item["id"], "output_index": index})
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": f"response.{answer['status']}", "response": answer}


def _parts(item: dict[str, Any], place: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if item["type"] == "function_call":
        name = "response.function_call_arguments"
        yield place | {"type": f"{name}.delta", "delta": item["arguments"]}
        yield place | {"type": f"{name}.done", "name": item["name"], "arguments": item["arguments"]}
        return
    (part,) = item["content"]
    place = place | {"content_index": 0}
    yield place | {"type": "response.content_part.added", "part": part | {"text": ""}}
    yield place | {"type": "response.output_text.delta", "delta": part["text"], "logprobs": []}
    yield place | {"type": "response.output_text.done", "text": part["text"], "logprobs": []}
    yield place | {"type": "response.content_part.done", "part": part}
