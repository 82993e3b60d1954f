"""A generation function that plays any environment with `reset` and `step`: one turn of the model is one action.

Replace `make_environment` by your own. Environments are synchronous: each move runs in a thread, so that a slow one
holds up nobody else.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from examples.gym_environment.environment import GuessNumber
from slime.agent.conversation import Conversation
from slime.utils.types import Sample, SampleStatus

TURN_TOKENS = 16
MOVE_DEADLINE_S = 30.0


def make_environment(sample: Sample) -> GuessNumber:
    """The environment of one rollout."""
    return GuessNumber()


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False) -> Sample:
    """Play until the environment or the tokens end; the reward is the sum of the moves'."""
    environment = make_environment(sample)
    # All samples of a prompt play the same game, so that their rewards compare.
    observation, _ = environment.reset(seed=sample.group_index or 0)
    sample.prompt, sample.tokens = [{"role": "user", "content": observation}], []
    conversation = Conversation(args, sample, sampling_params, evaluation=evaluation)
    total = 0.0
    while True:
        action = await conversation.reply(max_tokens=TURN_TOKENS)
        if sample.status in (SampleStatus.ABORTED, SampleStatus.FAILED):  # no move was made: the sample says why
            return sample
        start = time.monotonic()
        step = await asyncio.wait_for(asyncio.to_thread(environment.step, action), MOVE_DEADLINE_S)
        sample.non_generation_time += time.monotonic() - start
        total += step.reward
        if step.terminated or step.truncated or not conversation.can_go_on:
            break
        conversation.add({"role": "user", "content": step.observation})
    sample.reward = total
    return sample
