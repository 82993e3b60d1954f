"""`/v1/chat/completions`: its requests as turns of a session, and turns as its answers."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from slime.agent.session import MODEL_NAME, BadRequest, Session, Turn, TurnRequest
from slime.utils.types import Message


async def complete(session: Session, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request. Raises BadRequest, HTTPError."""
    stop = body.get("stop") or []
    turn = await session.say(
        TurnRequest(
            messages=_checked_messages(body),
            tools=body.get("tools"),
            max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
            stop=[stop] if isinstance(stop, str) else list(stop),
        )
    )
    return _answer(turn)


def events(answer: dict[str, Any]) -> Iterator[bytes]:
    """A whole answer as a stream: one chunk with the message, one with its end."""
    (choice,) = answer["choices"]
    head = {key: answer[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    calls = [call | {"index": number} for number, call in enumerate(choice["message"].get("tool_calls") or [])]
    delta = choice["message"] | ({"tool_calls": calls} if calls else {})
    for part, reason in ((delta, None), ({}, choice["finish_reason"])):
        chunk = head | {"choices": [{"index": 0, "delta": part, "finish_reason": reason}]}
        yield f"data: {json.dumps(chunk)}\n\n".encode()
    yield f"data: {json.dumps(head | {'choices': [], 'usage': answer['usage']})}\n\n".encode()
    yield b"data: [DONE]\n\n"


def _checked_messages(body: dict[str, Any]) -> list[Message]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"message {number} must be an object with a role")
    if body.get("n") not in (None, 1):
        raise BadRequest("n must be 1: ask several times instead")
    return messages


def _answer(turn: Turn) -> dict[str, Any]:
    finish_reason = "length" if turn.is_cut else "stop"
    choice = {
        "index": 0,
        "message": turn.message,
        "finish_reason": "tool_calls" if turn.message.get("tool_calls") else finish_reason,
        "logprobs": None,
    }
    usage = {
        "prompt_tokens": turn.num_prompt_tokens,
        "completion_tokens": turn.num_completion_tokens,
        "total_tokens": turn.num_prompt_tokens + turn.num_completion_tokens,
    }
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL_NAME,
        "choices": [choice],
        "usage": usage,
    }
