"""Rendering conversations with a tokenizer's own chat template, which may leave out text without a word."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from slime.utils.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool,
    tools: list[Any] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The text of the conversation.

    template_kwargs: variables of the template, such as {"enable_thinking": False}.
    Raises ValueError where the tokenizer has no template or the template refuses these messages.
    """
    import jinja2  # not for those who only read text prompts

    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(template_kwargs or {}),
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses these messages ({error})") from error
    return str(text)


def check_shown(messages: list[Message], rendered: str) -> None:
    """Raises ValueError, naming the message, where `rendered` lacks what templates are known to leave out or garble.

    Those of Qwen3 leave out content that is a list of parts, those of DeepSeek the calls of a turn with content; that
    of Qwen2.5 quotes arguments of calls that are JSON text already.
    """
    for number, message in enumerate(messages):
        content = message.get("content")
        parts = (
            [part.get("text") or "" for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        )
        if any(text.strip() not in rendered for text in parts):
            raise ValueError(
                f"message {number}: the chat template leaves out content given as a list of parts. Give it as text."
            )
        for call in message.get("tool_calls") or []:
            _check_call_shown(call.get("function", call), number, rendered)


def _check_call_shown(call: dict[str, Any], number: int, rendered: str) -> None:
    arguments = call.get("arguments")
    if str(call.get("name", "")) not in rendered:
        raise ValueError(f"message {number}: the chat template leaves out the call of {call['name']!r}")
    if isinstance(arguments, str) and arguments not in rendered and json.dumps(arguments) in rendered:
        raise ValueError(
            f"message {number}: the chat template quotes the arguments of {call['name']!r}, which are text. Give them "
            "as an object."
        )
