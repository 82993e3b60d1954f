"""One run of an agent: the turns that it asked for, recorded as samples."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from slime.agent.conversation import Conversation, sibling
from slime.agent.messages import assistant_message, for_template, say_the_same
from slime.rollout.sglang_rollout import SamplingParams, sampling_seed
from slime.utils.types import Message, Sample, SampleStatus

MODEL_NAME = "policy"


class BadRequest(ValueError):
    """The agent asked for what cannot be served; the message says why."""


class TurnRequest(NamedTuple):
    """A turn that an agent asks for. messages: the conversation so far. max_tokens: of the turn."""

    messages: list[Message]
    tools: list[Any] | None
    max_tokens: int | None
    stop: Sequence[str] = ()


class Turn(NamedTuple):
    """What the policy said, as a message. is_cut: it was at its limit."""

    message: Message
    is_cut: bool
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


class Known(NamedTuple):
    """The longest part of a request that was said here before: so many replies of a conversation."""

    conversation: Conversation
    num_turns: int
    num_messages: int


def _continues(known: Known) -> tuple[int, bool]:
    """The order of preference: what says most of it, and of these what ends there."""
    return known.num_messages, known.num_turns == len(known.conversation.marks)


class Session:
    """Conversations of one agent run, each recorded in a sibling of `sample`, which stays as it is.

    A request that repeats a conversation and adds to it continues that one, token by token. One that leaves it at an
    earlier turn branches off there. Any other begins a new one.
    """

    def __init__(self, args: Any, sample: Sample, sampling_params: SamplingParams, *, evaluation: bool) -> None:
        self.args = args
        self.sample = sample
        self.sampling_params = sampling_params
        self.evaluation = evaluation
        self.conversations: list[Conversation] = []
        self.responses: dict[str, list[Message]] = {}  # what was said up to each answer of /v1/responses
        self.generation_s = 0.0
        self._busy: set[Conversation] = set()
        self._num_requests = 0

    @property
    def samples(self) -> list[Sample]:
        """Those of all conversations in which the policy said something."""
        return [c.sample for c in self.conversations if c.sample.effective_response_length > 0]

    async def say(self, request: TurnRequest) -> Turn:
        """The policy's next turn. Raises BadRequest, HTTPError.

        Temperature and nucleus are the run's, whatever the agent asks for: training divides log-probs by them.
        """
        if request.max_tokens is not None and not (isinstance(request.max_tokens, int) and request.max_tokens > 0):
            raise BadRequest(f"the tokens of a turn must be a number above 0, got {request.max_tokens!r:.80}")
        try:
            conversation = self._conversation_for(request.messages, request.tools)
        except ValueError as error:  # the chat template refuses them
            raise BadRequest(str(error)) from error
        self._busy.add(conversation)
        start = time.monotonic()
        before = dataclasses.replace(conversation.sample.prefix_cache_info)
        is_said = False
        try:
            words = await conversation.reply(**self._turn_params(request, conversation))
            is_said = True
        except ValueError as error:
            raise BadRequest(str(error)) from error
        finally:
            if not is_said and conversation.marks:
                conversation.rewind()
            self._busy.discard(conversation)
            self.generation_s += time.monotonic() - start
        message = assistant_message(words, has_tools=bool(conversation.tools))
        conversation.record(for_template(message))
        sample = conversation.sample
        if sample.status in (SampleStatus.ABORTED, SampleStatus.FAILED):
            raise BadRequest(f"the turn was not sampled: the sample is {sample.status.value}")
        num_prompt = sample.prefix_cache_info.total_prompt_tokens - before.total_prompt_tokens
        return Turn(
            message,
            is_cut=sample.status is SampleStatus.TRUNCATED,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=sample.prefix_cache_info.cached_tokens - before.cached_tokens,
            num_completion_tokens=len(sample.tokens) - num_prompt,
        )

    def _turn_params(self, request: TurnRequest, conversation: Conversation) -> dict[str, Any]:
        self._num_requests += 1
        params: dict[str, Any] = {} if request.max_tokens is None else {"max_tokens": request.max_tokens}
        if request.stop:
            params["stop"] = request.stop
        if self._num_requests > 1:  # equal requests of one agent shall not get equal answers
            name = f"{self.sample.index}/{self._num_requests}"
            num_tokens = len(conversation.sample.tokens)
            params["sampling_seed"] = sampling_seed(self.args.rollout_seed, name, num_tokens)
        return params

    def _conversation_for(self, messages: list[Message], tools: list[Any] | None) -> Conversation:
        known = max((self._known(c, messages) for c in self.conversations), key=_continues, default=None)
        if known is None or known.num_turns == 0:
            conversation = self._begin(messages, tools)
            self.conversations.append(conversation)
            return conversation
        conversation = known.conversation
        if known.num_turns < len(conversation.marks) or conversation in self._busy:
            conversation = conversation.branch(known.num_turns)
            self.conversations.append(conversation)
        conversation.tools = tools if tools is not None else conversation.tools
        conversation.add(*(for_template(message) for message in messages[known.num_messages :]))
        return conversation

    def _begin(self, messages: list[Message], tools: list[Any] | None) -> Conversation:
        sample = sibling(self.sample)
        sample.prompt = [for_template(message) for message in messages]
        sample.session_id = uuid.uuid4().hex
        return Conversation(self.args, sample, self.sampling_params, tools=tools, evaluation=self.evaluation)

    def _known(self, conversation: Conversation, messages: list[Message]) -> Known:
        """How much of `messages` is this conversation up to one of its replies."""
        for num_turns in range(len(conversation.marks), 0, -1):
            num_messages = conversation.marks[num_turns - 1].num_messages
            if say_the_same(conversation.messages[:num_messages], messages[:num_messages]) and (
                len(messages) > num_messages
            ):
                return Known(conversation, num_turns, num_messages)
        return Known(conversation, 0, 0)
