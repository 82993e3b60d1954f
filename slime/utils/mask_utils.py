r"""Token ids and loss masks of multi-turn conversations, found by template difference.

A turn is trained on exactly where the policy would have sampled it: from the end of the generation prompt to the
token that ends the turn. For a Qwen conversation:

    <|im_start|> user \n hi <|im_end|> \n <|im_start|> assistant \n hello <|im_end|> \n
          0        0   0  0      0      0       0          0      0    1       1      0

`step_loss_mask: 0` in a message leaves its turn out; 1 is the default.

Where a turn stands is never counted by hand. With render(.) the tokenizer's own template, `render(turns before it, with
generation prompt)` must be a prefix of `render(turns up to it)`, and that of `render(conversation)`; otherwise the turn
cannot be masked exactly and is an error. The families differ in what their templates do to earlier turns:

    qwen          nothing: each rendering is a prefix of the next
    qwen3         drops the reasoning before the last user message, and what a generation prompt says of it. Such a turn
                  is trained on as the whole rendering has it; it is an error if that lost some of its text
    qwen3_5       the same, its generation prompt opens the reasoning
    distill_qwen  drops the reasoning of every turn, so only the last turn can be trained on: its content, reasoning
                  included, behind the generation prompt
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from slime.utils.chat_template import check_shown, render_chat
from slime.utils.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_TYPES = ("qwen", "qwen3", "qwen3_5", "distill_qwen")

# Turns put behind a conversation to see how it is rendered when it is not the end. A system message leaves "the last
# user message" where it was, a user message moves it.
_PROBE_TEXT = "loss mask probe"
_PROBES: tuple[Message, ...] = ({"role": "system", "content": _PROBE_TEXT}, {"role": "user", "content": _PROBE_TEXT})

_THINK_TAG = re.compile(r"</?think>")  # around it templates put line breaks of their own

Render = Callable[..., str]  # (messages, add_generation_prompt=False) -> text


class Segment(NamedTuple):
    """A piece of the rendered conversation."""

    text: str
    is_trained: bool


class MultiTurnLossMaskGenerator:
    """Token ids and loss masks of conversations under one tokenizer.

    tokenizer_type: the chat family, one of `TOKENIZER_TYPES`.
    template_kwargs: variables of the chat template, such as {"enable_thinking": False}.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_type: str = "qwen",
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if tokenizer_type not in TOKENIZER_TYPES:
            raise ValueError(f"--loss-mask-type must be one of {', '.join(TOKENIZER_TYPES)}, got {tokenizer_type!r}")
        self.tokenizer = tokenizer
        self.tokenizer_type = tokenizer_type
        self.template_kwargs = template_kwargs or {}
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = set(tokenizer.all_special_ids) | {index for index, token in added if token.special}

    def get_loss_mask(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[int], list[int]]:
        """The token ids of the conversation and a mask of the same length, 1 where a token is trained on.

        messages: {"role", "content", optional "step_loss_mask" 0 or 1, ...}; assistant turns are trained on.
        Raises ValueError, naming the message, where a turn cannot be masked exactly.
        """
        trained = [number for number, message in enumerate(messages) if _is_trained(message, number)]
        clean = [{key: value for key, value in message.items() if key != "step_loss_mask"} for message in messages]

        def render(turns: list[Message], *, add_generation_prompt: bool = False) -> str:
            return render_chat(
                self.tokenizer,
                turns,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                template_kwargs=self.template_kwargs,
            )

        check_shown(clean, render(clean))
        if self.tokenizer_type == "distill_qwen" and trained:
            segments = _last_turn_segments(clean, trained, render)
        else:
            segments = _segments(clean, trained, render, allow_shortened=self.tokenizer_type in ("qwen3", "qwen3_5"))
        return self._encode(segments)

    def get_response_lengths(self, loss_masks: list[list[int]]) -> list[int]:
        """Tokens from the first that is trained on to the end, for each mask; 0 where there is none."""
        return [len(mask) - mask.index(1) if 1 in mask else 0 for mask in loss_masks]

    def get_text_from_loss_mask(self, token_ids: list[int], loss_mask: list[int]) -> list[str]:
        """The text of each stretch of tokens that is trained on."""
        runs = groupby(zip(token_ids, loss_mask, strict=True), key=lambda pair: pair[1])
        return [self._decode([token_id for token_id, _ in run]) for is_trained, run in runs if is_trained]

    def _encode(self, segments: list[Segment]) -> tuple[list[int], list[int]]:
        """Tokenizes segment by segment, as a prompt and its response are at generation.

        A token of the whole text that reached over a boundary is therefore split there. Raises ValueError if the tokens
        spell another text than those of the whole.
        """
        segments = [segment for segment in segments if segment.text]
        texts = [segment.text for segment in segments]
        whole_ids, *pieces = self.tokenizer(["".join(texts), *texts], add_special_tokens=False)["input_ids"]
        token_ids: list[int] = []
        loss_mask: list[int] = []
        for piece, segment in zip(pieces, segments, strict=True):
            num_trained = self._turn_length(piece) if segment.is_trained else 0
            token_ids += piece
            loss_mask += [1] * num_trained + [0] * (len(piece) - num_trained)
        if token_ids != whole_ids and self._decode(token_ids) != self._decode(whole_ids):
            raise ValueError("the tokenizer gives other text for a turn alone than within the conversation")
        return token_ids, loss_mask

    def _turn_length(self, token_ids: list[int]) -> int:
        """Tokens up to the one that ends the turn, without the line break that a template puts behind it."""
        last_special = max((place for place, index in enumerate(token_ids) if index in self._special_ids), default=-1)
        behind = token_ids[last_special + 1 :]
        return len(token_ids) - len(behind) if last_special >= 0 and self._decode(behind).isspace() else len(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _is_trained(message: Message, number: int) -> bool:
    mask: int = message.get("step_loss_mask", 1)
    if mask not in (0, 1):
        raise ValueError(f"message {number}: step_loss_mask must be 0 or 1, got {mask!r}")
    return bool(mask) and message["role"] == "assistant"


def _segments(messages: list[Message], trained: list[int], render: Render, *, allow_shortened: bool) -> list[Segment]:
    """The whole rendering, cut at the ends of the trained turns."""
    whole = render(messages)
    segments = []
    end = 0
    for number in trained:
        if number == 0:
            raise ValueError("message 0 is an assistant turn: there is no prompt it could answer")
        bounds = _bounds(messages, number, whole, render)
        if bounds is None and allow_shortened:
            bounds = _shortened_bounds(messages, number, whole, render)
        if bounds is None:
            raise ValueError(
                f"message {number}: the chat template renders this turn differently once the conversation goes on, so "
                "it cannot be masked exactly. Set its step_loss_mask to 0, or choose another --loss-mask-type."
            )
        start, stop = bounds
        _check_kept(messages[number], number, whole[start:stop])
        segments += [Segment(whole[end:start], False), Segment(whole[start:stop], True)]
        end = stop
    return [*segments, Segment(whole[end:], False)]


def _bounds(messages: list[Message], number: int, whole: str, render: Render) -> tuple[int, int] | None:
    """Where turn `number` starts and stops in `whole`, if `whole` has it as it was sampled."""
    prompt = render(messages[:number], add_generation_prompt=True)
    answered = render(messages[: number + 1])
    if answered.startswith(prompt) and whole.startswith(answered):
        return len(prompt), len(answered)
    return None


def _shortened_bounds(messages: list[Message], number: int, whole: str, render: Render) -> tuple[int, int] | None:
    """Where turn `number` stands in `whole`, if the template shortened it.

    It starts behind as much of the generation prompt as stands before any other words in its place, too.
    """
    begin = _end_within(messages[:number], whole, render)
    stop = _end_within(messages[: number + 1], whole, render)
    if begin is None or stop is None:
        return None
    prompt = render(messages[:number], add_generation_prompt=True).removeprefix(render(messages[:number]))
    other = {key: value for key, value in messages[number].items() if key != "reasoning_content"}
    replaced = render([*messages[:number], {**other, "content": _PROBE_TEXT}, *messages[number + 1 :]])
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, replaced[begin:], strict=False))
    header = "".join(letter for letter, _ in same)
    if not header or not whole.startswith(header, begin):
        return None
    return begin + len(header), stop


def _check_kept(message: Message, number: int, rendered: str) -> None:
    for key in ("reasoning_content", "content"):
        text = message.get(key)
        if isinstance(text, str) and not all(part.strip() in rendered for part in _THINK_TAG.split(text)):
            raise ValueError(
                f"message {number}: the chat template drops part of its {key} (of reasoning, perhaps) here. Set its "
                "step_loss_mask to 0, or end a conversation of its own with this turn."
            )


def _end_within(messages: list[Message], whole: str, render: Render) -> int | None:
    """Where `messages` end in `whole`, of which they are the beginning, whatever follows there.

    With a probe turn p behind them, render(m p) = m' p' and render(m p p) = m' p' p' give p' by difference, hence m'.
    """
    alone = render(messages)
    if whole.startswith(alone):
        return len(alone)
    for probe in _PROBES:
        try:
            once, twice = render([*messages, probe]), render([*messages, probe, probe])
        except ValueError:  # this template has no such turn at this place: the other probe may do
            continue
        probe_text = twice.removeprefix(once)
        if probe_text and once.endswith(probe_text) and whole.startswith(once.removesuffix(probe_text)):
            return len(once) - len(probe_text)
    return None


def _last_turn_segments(messages: list[Message], trained: list[int], render: Render) -> list[Segment]:
    """The generation prompt, then the last message's content and what the template ends a turn with."""
    last = len(messages) - 1
    if trained != [last]:
        raise ValueError(
            f"message {trained[0]}: under --loss-mask-type distill_qwen only the last message can be trained on, the "
            "template drops the reasoning of others. Set their step_loss_mask to 0."
        )
    *context, answer = messages
    content = answer["content"]
    if not context or not isinstance(content, str):
        raise ValueError(f"message {last}: must be text that answers an earlier message")
    prompt = render(context, add_generation_prompt=True)
    head, found, ending = render([*context, {"role": "assistant", "content": _PROBE_TEXT}]).rpartition(_PROBE_TEXT)
    whole = render(messages)
    kept = whole[len(head) : len(whole) - len(ending)]
    if not (found and whole == head + kept + ending and prompt.startswith(head) and content.endswith(kept)):
        raise ValueError(f"message {last}: the chat template is not of the family distill_qwen")
    response = _without_opening(content, prompt.removeprefix(head)) + ending
    _check_kept(answer, last, prompt.removeprefix(head) + response)
    return [Segment(prompt, False), Segment(response, True)]


def _without_opening(content: str, opening: str) -> str:
    """`content` without the `opening`, such as "<think>\n", that the generation prompt has said for it already."""
    tag = opening.strip()
    if content.startswith(opening) or not (tag and content.lstrip().startswith(tag)):
        return content.removeprefix(opening)
    return content.lstrip().removeprefix(tag).lstrip("\n")
