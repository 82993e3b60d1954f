"""Chat messages and chat templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slime.utils.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_messages(value: list[Any], location: str) -> list[Message]:
    """`value`, if it is a conversation: a list of {"role": str, "content": str | list | None, ...}, not empty.

    Keys that are null, as parquet fills them in for records of one column, count as absent; only content may be null.
    Raises ValueError with `location` and what is wrong.
    """
    if not value:
        raise ValueError(f"{location}: the list of messages is empty")
    return [_check_message(message, f"{location}: message {number}") for number, message in enumerate(value)]


def _check_message(message: Any, location: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f'{location} must be {{"role": ..., "content": ...}}, got {message!r:.80}')
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        raise ValueError(f"{location} lacks {' and '.join(missing)}, it has {sorted(message)}")
    if not isinstance(message["role"], str):
        raise ValueError(f"{location}: role must be a string, got {message['role']!r:.80}")
    if not isinstance(message["content"], str | list | None):
        raise ValueError(f"{location}: content must be a string or a list of parts, got {message['content']!r:.80}")
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    tools: list[Any] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The text that asks for the next assistant turn: the tokenizer's chat template with its generation prompt.

    template_kwargs: variables of the template, such as {"enable_thinking": False}.
    Raises ValueError where the tokenizer has no template or the template refuses these messages.
    """
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **(template_kwargs or {})
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses these messages ({error})") from error
    return str(text)
