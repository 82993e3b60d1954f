"""Chat messages and chat templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slime.utils.chat_template import check_shown, render_chat
from slime.utils.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "slime turn probe"


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
    Raises ValueError where the tokenizer has no template, the template refuses these messages, or leaves out a part.
    """
    text = render_chat(tokenizer, messages, add_generation_prompt=True, tools=tools, template_kwargs=template_kwargs)
    check_shown(messages, text)
    return text


def following_text(
    tokenizer: PreTrainedTokenizerBase,
    before: list[Message],
    new: list[Message],
    *,
    tools: list[Any] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """What the chat template puts behind the words of an assistant turn when `new` follows it: the end of that turn,
    the new messages, and the next generation prompt.

    before: the conversation up to and without that turn. Found by difference, with a turn of known words in its place,
    so that it holds for templates that render earlier turns otherwise once the conversation goes on.

        following_text(qwen, [user], [{"role": "user", "content": "and 2+2?"}])
        == "<|im_end|>\\n<|im_start|>user\\nand 2+2?<|im_end|>\\n<|im_start|>assistant\\n"

    Raises ValueError where the template refuses the messages or does not show that turn.
    """
    turns = [*before, {"role": "assistant", "content": _PROBE}, *new]
    text = render_chat(tokenizer, turns, add_generation_prompt=True, tools=tools, template_kwargs=template_kwargs)
    _, found, behind = text.rpartition(_PROBE)
    if not found:
        raise ValueError("the chat template does not show an assistant turn as it was said: it cannot be continued")
    check_shown(new, behind)  # what the template makes of earlier turns does not matter: their tokens are there
    return behind
