"""Generation by an agent that knows nothing of slime: `--agent-function-path my_agent.run`.

    def run(base_url, sample):                       # or async def
        client = openai.OpenAI(base_url=base_url, api_key="none")
        ...                                          # as many turns, tools and conversations as it likes
        return 1.0                                   # the reward; None leaves it to --rm-type or --custom-rm-path

What it asks of the server is recorded; each conversation becomes a `Sample`, siblings of one rollout.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slime.agent.front import front_of_loop
from slime.agent.session import Session
from slime.rollout.sglang_rollout import SamplingParams
from slime.utils.misc import load_function
from slime.utils.types import Sample, SampleStatus

MAX_THREADS = 1024  # agents that are plain functions run in threads, one each


async def generate(
    args: Any, sample: Sample, sampling_params: SamplingParams, evaluation: bool = False
) -> list[Sample] | Sample:
    """Run the agent of --agent-function-path on `sample`; the samples of its conversations.

    An agent that raises, asks for nothing, or takes longer than --agent-timeout-s leaves `sample` FAILED. Where a turn
    was aborted some of the samples are ABORTED: the agent starts over, for nobody can bring it back to where it was.
    """
    agent = load_function(args.agent_function_path)
    front = await front_of_loop()
    session = Session(args, sample, sampling_params, evaluation=evaluation)
    start = time.monotonic()
    failure = ""
    try:
        with front.serving(session) as base_url:
            async with asyncio.timeout(args.agent_timeout_s):
                reward = await _run(agent, base_url, sample)
    except asyncio.CancelledError:
        _take_along(sample, session)
        raise
    except TimeoutError:
        failure = f"the agent did not end within --agent-timeout-s {args.agent_timeout_s:g}"
    except Exception as error:  # an agent may raise anything; it fails its sample, by name
        failure = f"the agent raised {type(error).__name__}: {error}"
    if any(conversation.sample.status is SampleStatus.ABORTED for conversation in session.conversations):
        return [conversation.sample for conversation in session.conversations]
    samples = session.samples
    if failure or not samples:
        return _failed(sample, failure or "the agent asked for no chat completion that the policy answered")
    samples[0].non_generation_time += max(0.0, time.monotonic() - start - session.generation_s)
    for member in samples:
        member.reward = reward
    return samples


async def _run(agent: Any, base_url: str, sample: Sample) -> float | dict[str, Any] | None:
    if inspect.iscoroutinefunction(agent):
        reward: float | dict[str, Any] | None = await agent(base_url, sample)
        return reward
    return await asyncio.get_running_loop().run_in_executor(_threads(), agent, base_url, sample)


def _take_along(sample: Sample, session: Session) -> None:
    """Put what was sampled into `sample`, for whoever takes it back to its prompt to count as lost."""
    for member in session.samples:
        response = member.tokens[-member.response_length :]
        mask = member.loss_mask or [1] * len(response)
        sampled = [token for token, is_sampled in zip(response, mask, strict=True) if is_sampled]
        sample.append_response_tokens(tokens=sampled)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="agent")


def _failed(sample: Sample, reason: str) -> Sample:
    sample.status = SampleStatus.FAILED
    sample.metadata["failure"] = reason
    return sample
