"""A conversation whose turns the policy samples, recorded token by token in one `Sample`.

    conversation = Conversation(args, sample, sampling_params)
    answer = await conversation.reply()                                        # sampled: trained on
    conversation.add({"role": "user", "content": "Are you sure?"})             # told: not trained on
    revised = await conversation.reply()

    sample.tokens    = [prompt | a a a <|im_end|> | \n <|im_start|> user ... assistant \n | b b <|im_end|>]
    sample.loss_mask =          [1 1 1     1         0      0        0  ...      0      0   1 1     1     ]

Token in, token out: what the engine sampled stays as it is, and the text of a turn is never tokenised again. What
stands between two turns is what the chat template puts there.
"""

from __future__ import annotations

import copy
import uuid
from typing import Any, NamedTuple

from slime.data.chat import following_text, render_prompt
from slime.rollout.sglang_rollout import SamplingParams, encode_prompt, generate, whole_text
from slime.rollout.tokenizer import tokenizer_of
from slime.rollout.turns import SampledTurn, keep_turn, start_over, turns_of
from slime.utils.types import Message, Sample, SampleStatus


class Mark(NamedTuple):
    """How far a conversation was after one of its sampled turns."""

    num_messages: int
    num_tokens: int
    response_length: int
    num_chars: int


class Conversation:
    """Turns of one conversation; `sample` is what is trained on.

    sample: its prompt is either text (the chat template was applied) or the messages so far. One that was interrupted
        goes on where it was: as long as prompt and what is told come out as they did, `reply` repeats its turns.
    sampling_params: those that a generate function is given; `max_new_tokens` bounds the whole response.
    tools: descriptions for the chat template; default those of the data.
    Raises ValueError where the chat template refuses the messages.
    """

    def __init__(
        self,
        args: Any,
        sample: Sample,
        sampling_params: SamplingParams,
        *,
        tools: list[Any] | None = None,
        evaluation: bool = False,
    ) -> None:
        self.args = args
        self.sample = sample
        self.sampling_params = sampling_params
        self.evaluation = evaluation
        self.tools = tools if tools is not None else sample.metadata.get("tools")
        self.tokenizer = tokenizer_of(args)
        self.marks: list[Mark] = []
        self._new: list[Message] = []
        if sample.session_id is None:
            sample.session_id = uuid.uuid4().hex  # turns of one conversation reach the engine that knows its prefix
        kept = sample.turns if sample.status is SampleStatus.ABORTED else []
        if sample.loss_mask and not any(sample.loss_mask):  # --mask-offpolicy-in-partial-rollout
            kept = [turn | {"is_trained": False} for turn in kept]
        if sample.response_length > 0:
            start_over(sample)
        sample.turns = kept
        if isinstance(sample.prompt, str):
            self.messages: list[Message] = [{"role": "user", "content": sample.prompt}]
            sample.tokens = sample.tokens or encode_prompt(self.tokenizer, sample)
        else:
            self.messages = [dict(message) for message in sample.prompt]
            text = render_prompt(
                self.tokenizer, self.messages, tools=self.tools, template_kwargs=args.apply_chat_template_kwargs
            )
            sample.tokens = self._encode(text)

    @property
    def can_go_on(self) -> bool:
        """Whether there is room for another turn, and the last was neither aborted nor failed."""
        sample, args = self.sample, self.args
        context = args.eval_max_context_len if self.evaluation else args.rollout_max_context_len
        has_room = sample.response_length < self.sampling_params["max_new_tokens"] and (
            context is None or len(sample.tokens) < context
        )
        return has_room and sample.status not in (SampleStatus.ABORTED, SampleStatus.FAILED)

    def add(self, *messages: Message) -> None:
        """What tools, users and environments say to the last reply; in front of the next one, not trained on."""
        if not self.marks:
            raise ValueError("a conversation goes on after its first reply; what comes before belongs in the prompt")
        self._new += messages

    async def reply(self, *, max_tokens: int | None = None, **params: Any) -> str:
        """Sample the next turn. Returns its words, without the token that ends it.

        max_tokens: of this turn. params: sampling parameters that differ for it. Where no token fits any more the turn
        is empty and the sample TRUNCATED. Raises HTTPError, and ValueError as the constructor.
        """
        sample = self.sample
        self._append_told()
        begin, num_chars = len(sample.tokens), len(sample.response)
        settings = self.sampling_params | params
        if max_tokens is not None:
            limit = sample.response_length + max_tokens
            settings["max_new_tokens"] = min(settings["max_new_tokens"], limit)
        earlier = self._repeat()
        if earlier is None or sample.status is SampleStatus.ABORTED:
            await self._sample(settings, earlier, num_chars)
        words = self._without_end(sample.response[num_chars:], sample.tokens[begin:])
        self.record({"role": "assistant", "content": words})
        return words

    def _repeat(self) -> SampledTurn | None:
        """The turn that was sampled here before the conversation was interrupted, said again; None if there is none."""
        place, begin = len(self.marks), self._last_end.num_tokens
        turns = turns_of(self.sample)
        if place >= len(turns) or turns[place].told != self.sample.tokens[begin:]:
            self.sample.turns = self.sample.turns[:place]
            return None
        turns[place].append_to(self.sample)
        return turns[place]

    async def _sample(self, settings: SamplingParams, earlier: SampledTurn | None, num_chars: int) -> None:
        """Sample a turn, or the rest of one of which `earlier` is the beginning, and keep it with the sample.

        num_chars: of the response in front of the turn.
        """
        sample, end = self.sample, self._last_end
        num_earlier = len(earlier.tokens) if earlier else 0
        num_tokens, text_end = len(sample.tokens), len(sample.response)
        num_versions = len(sample.weight_versions) - (len(earlier.weight_versions) if earlier else 0)
        begin = num_tokens - num_earlier
        sample.status = SampleStatus.PENDING
        await generate(self.args, sample, settings, evaluation=self.evaluation)
        if num_earlier:
            skip = bool(settings["skip_special_tokens"])
            new = len(sample.tokens) - num_tokens
            text = whole_text(self.tokenizer, sample.tokens[begin:], new, sample.response[text_end:], skip=skip)
            sample.response = sample.response[:num_chars] + text
        log_probs = sample.rollout_log_probs
        turn = SampledTurn(
            told=sample.tokens[end.num_tokens : begin],
            told_text=sample.response[end.num_chars : num_chars],
            tokens=sample.tokens[begin:],
            text=sample.response[num_chars:],
            log_probs=None if log_probs is None else log_probs[len(log_probs) - (len(sample.tokens) - begin) :],
            weight_versions=sample.weight_versions[num_versions:],
            status=sample.status.value,
            is_trained=earlier is None or num_earlier == 0 or earlier.is_trained,
            routed_experts=_experts_since(sample, end.num_tokens),
        )
        keep_turn(sample, len(self.marks), turn)

    @property
    def _last_end(self) -> Mark:
        """Where the last turn ended."""
        return self.marks[-1] if self.marks else Mark(0, 0, 0, 0)

    def record(self, message: Message) -> None:
        """Note the turn just sampled as `message`: the last one again, where it is to be known in another form."""
        if self.marks and self.marks[-1].num_tokens == len(self.sample.tokens):
            self.marks.pop()
            self.messages.pop()
        self.messages.append(message)
        sample = self.sample
        mark = Mark(len(self.messages), len(sample.tokens), sample.response_length, len(sample.response))
        self.marks.append(mark)

    def rewind(self) -> None:
        """Back to where the last reply ended, as if nothing had been said since."""
        mark, sample = self.marks[-1], self.sample
        self._new = []
        self.messages = self.messages[: mark.num_messages]
        sample.tokens, sample.response_length = sample.tokens[: mark.num_tokens], mark.response_length
        sample.response = sample.response[: mark.num_chars]
        if sample.rollout_routed_experts is not None:
            sample.rollout_routed_experts = sample.rollout_routed_experts[: mark.num_tokens - 1]
        for name in ("loss_mask", "rollout_log_probs"):
            values = getattr(sample, name)
            setattr(sample, name, None if values is None else values[: mark.response_length])

    def branch(self, num_turns: int) -> Conversation:
        """A conversation of its own that goes on after the first `num_turns` replies, which it does not train on again:
        they are trained on here."""
        other = copy.copy(self)
        other.marks = self.marks[:num_turns]
        mine, other.sample = self.sample, sibling(self.sample)
        other.sample.tokens, other.sample.response = mine.tokens, mine.response
        other.sample.rollout_log_probs = mine.rollout_log_probs
        other.sample.rollout_routed_experts = mine.rollout_routed_experts
        other.sample.loss_mask = [0] * mine.response_length
        other.rewind()
        return other

    def _append_told(self) -> None:
        """Tokens of what was said since the last turn, and of the generation prompt."""
        if not self.marks:
            return
        text = following_text(
            self.tokenizer,
            self.messages[:-1],
            self._new,
            tools=self.tools,
            template_kwargs=self.args.apply_chat_template_kwargs,
        )
        token_ids = self._encode(text)
        if self.sample.tokens[-1] == token_ids[0]:  # the policy has ended its turn itself
            token_ids = token_ids[1:]
        told = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        self.sample.append_response_tokens(self.args, tokens=token_ids, trainable=False, text=told)
        self.messages += self._new
        self._new = []

    def _encode(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids

    def _without_end(self, text: str, token_ids: list[int]) -> str:
        if not token_ids or token_ids[-1] not in self.tokenizer.all_special_ids:
            return text
        return text.removesuffix(self.tokenizer.decode(token_ids[-1:], skip_special_tokens=False))


def _experts_since(sample: Sample, num_tokens: int) -> Any:
    """Of the tokens whose experts were not known when there were `num_tokens`; None where they still are not."""
    experts = sample.rollout_routed_experts
    return None if experts is None or len(experts) < len(sample.tokens) - 1 else experts[max(0, num_tokens - 1) :]


def sibling(sample: Sample) -> Sample:
    """Another sample of the same prompt and the same rollout, with nothing generated yet."""
    other = copy.copy(sample)
    other.metadata = dict(sample.metadata)
    start_over(other)
    return other
