"""Two turns: the model answers, is asked whether it is sure, and answers again. The second answer is scored."""

from __future__ import annotations

from typing import Any

from slime.agent.conversation import Conversation
from slime.utils.types import Message, Sample

DOUBT: Message = {"role": "user", "content": "Are you sure? Say the result only."}
TURN_TOKENS = 24


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False) -> Sample:
    """Both turns are trained on, the doubt between them is not."""
    conversation = Conversation(args, sample, sampling_params, evaluation=evaluation)
    first = await conversation.reply(max_tokens=TURN_TOKENS)
    second = first
    if conversation.can_go_on:
        conversation.add(DOUBT)
        second = await conversation.reply(max_tokens=TURN_TOKENS)
    sample.metadata["answers"] = [first, second]
    return sample


async def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1 for a right second answer; half of it where the first was right and the doubt won."""
    first, second = (answer.strip() == sample.label for answer in sample.metadata["answers"])
    return 1.0 if second else 0.5 * first
