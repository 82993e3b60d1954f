"""Conversations that were interrupted go on where they were: every token is sampled once, or counted as lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from helpers.embedded_engine import EngineUnderTest
from helpers.scripted_engine import ABORTED, ScriptedEngine, router_flags, scripted_engine

from slime.agent.conversation import Conversation
from slime.arguments import Args
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.rollout.sglang_rollout import GenerateState, generate_and_rm, generate_rollout
from slime.rollout.state_file import read_state, write_state
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.async_utils import run
from slime.utils.types import Sample, SampleStatus

USER = {"role": "user", "content": "what is 17 + 25 ?"}
END = "<|im_end|>"
TURN = 24  # tokens of each turn of a long conversation
told_to_end: list[GenerateState] = []
observations: dict[int | None, list[str]] = {}
tool_calls: list[int | None] = []
hanging: set[int | None] = set()


# --- generation functions


async def three_turns(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Short for odd prompts, long for even ones; resets the sample as an environment does."""
    sample.prompt, sample.tokens = [USER], []
    conversation = Conversation(args, sample, sampling_params | {"ignore_eos": True})
    is_long = sample.metadata.get("n", 0) % 2 == 0
    for number in range(3 if is_long else 1):
        if number:
            conversation.add({"role": "user", "content": f"again, {number}"})
        await conversation.reply(max_tokens=TURN if is_long else 3)
        if sample.status is SampleStatus.ABORTED:
            return sample
    return sample


async def asks_a_tool(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Two turns, and what a tool says between them."""
    conversation = Conversation(args, sample, sampling_params)
    await conversation.reply(max_tokens=8)
    if conversation.can_go_on:
        tool_calls.append(sample.index)
        if sample.index in hanging:
            hanging.discard(sample.index)
            await asyncio.Event().wait()
        said = observations.get(sample.index, ["42"])
        conversation.add({"role": "tool", "content": said.pop(0) if len(said) > 1 else said[0]})
        await conversation.reply(max_tokens=8)
    return sample


async def is_told_to_end(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """As `asks_a_tool`; the rollout ends while it runs the first time."""
    if sample.status is SampleStatus.PENDING:
        told_to_end[0].is_aborted = True
    return await asks_a_tool(args, sample, sampling_params)


# --- one conversation, its engine scripted


class Scripted(NamedTuple):
    """An engine that says what a test wants, settings, and a function that generates (with a new state, by default)."""

    played: ScriptedEngine
    args: Args
    generated: Callable[..., Sample]


@contextmanager
def scripted(make_args: Any, says: list[str], generation: str) -> Iterator[Scripted]:
    words = iter(says)
    with scripted_engine(tokenizer_of(make_args()), lambda text: next(words)) as (played, through):
        args = make_args("--custom-generate-function-path", f"{__name__}.{generation}", *through)

        def generated(sample: Sample, state: GenerateState | None = None) -> Sample:
            state = state or GenerateState(args)
            output = run(generate_and_rm(args, sample, state.sampling_params, state=state))
            assert isinstance(output, Sample)
            return output

        yield Scripted(played, args, generated)


@pytest.fixture
def interrupted(make_args: Any, tmp_path: Path) -> Iterator[tuple[Scripted, Sample]]:
    """A conversation that was aborted in its second turn, out of a checkpoint, and the means to go on with it."""
    tool_calls.clear()
    observations.clear()
    with scripted(make_args, ["hello", ABORTED, "world"], "is_told_to_end") as parts:
        told_to_end[:] = [GenerateState(parts.args)]
        sample = parts.generated(Sample(index=0, prompt=[USER]), told_to_end[0])
        assert sample.status is SampleStatus.ABORTED
        write_state(tmp_path / "state", sample.to_dict())
        yield parts, Sample.from_dict(read_state(tmp_path / "state"))


BETWEEN = f"{END}\n<|im_start|>tool\n42{END}\n<|im_start|>assistant\n"


def test_finished_turns_are_repeated_and_the_unfinished_one_goes_on(interrupted: Any) -> None:
    (played, args, generated), sample = interrupted
    before = list(sample.tokens)
    again = generated(sample)
    again.check()
    assert again.status is SampleStatus.COMPLETED and again.turns == []
    assert again.tokens[: len(before)] == before == played.inputs[2]
    assert len(played.inputs) == 3 and tool_calls == [0, 0]  # its tool is asked again
    begun = tokenizer_of(args).decode(before[-1:])
    assert again.response == f"hello{BETWEEN}{begun}world{END}"
    assert again.effective_response_length == played.num_generated
    assert again.rollout_log_probs == [-0.5 * flag for flag in again.loss_mask or []]
    assert again.weight_versions == ["1", "1", "1"]


def test_a_tool_that_says_something_else_leads_on_from_there_and_what_came_after_is_counted(interrupted: Any) -> None:
    (played, args, generated), sample = interrupted
    observations[0] = ["43"]
    state = GenerateState(args)
    again = generated(sample, state)
    again.check()
    assert again.response == f"hello{BETWEEN.replace('42', '43')}world{END}"
    assert state.num_lost_tokens == 1  # the beginning of the second turn
    assert again.effective_response_length + state.num_lost_tokens == played.num_generated


def test_turns_that_are_masked_when_they_are_taken_up_stay_masked(interrupted: Any) -> None:
    (_, _, generated), sample = interrupted
    hello = len(sample.turns[0]["tokens"])
    sample.loss_mask = [0] * sample.response_length  # as --mask-offpolicy-in-partial-rollout does
    num_begun = sample.response_length
    again = generated(sample)
    again.check()
    assert again.loss_mask == [0] * num_begun + [1] * (again.response_length - num_begun)
    assert (again.rollout_log_probs or [])[:hello] == [-0.5] * hello


def test_a_second_conversation_of_one_generation_repeats_nothing(make_args: Any) -> None:
    with scripted(make_args, ["hello", "world"], "asks_a_tool") as (_, args, _):
        sample, params = Sample(index=0, prompt=[USER]), GenerateState(args).sampling_params
        assert run(Conversation(args, sample, params).reply()) == "hello"
        assert run(Conversation(args, sample, params).reply()) == "world"
    assert sample.response == f"world{END}"


# --- whole rollouts, with an engine


@pytest.fixture
def partial_args(make_args: Any, engine: EngineUnderTest, tmp_path: Path) -> Callable[..., Args]:
    """Settings of partial rollouts: 4 groups of 2 are drawn, 2 are kept."""
    rows = [{"input": [USER], "metadata": {"n": n}} for n in range(16)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(generation: str, *flags: str) -> Args:
        return make_args(  # type: ignore[no-any-return]
            *("--prompt-data", str(path), "--rollout-batch-size", "2", "--over-sampling-batch-size", "4"),
            *("--partial-rollout", "--custom-generate-function-path", f"{__name__}.{generation}"),
            *("--rollout-max-response-len", "200", "--save", str(tmp_path), "--load", str(tmp_path)),
            *router_flags(engine.url),
            *flags,
        )

    return make


def generated_tokens(engine: EngineUnderTest) -> int:
    return int(engine.get("/server_info").json["counters"]["generated_tokens"])


def sampled(groups: list[list[Sample]]) -> int:
    return sum(sample.effective_response_length for group in groups for sample in group)


def test_no_token_of_interrupted_conversations_is_sampled_twice_or_lost_over_a_resume(
    partial_args: Callable[..., Args], engine: EngineUnderTest
) -> None:
    args = partial_args("three_turns")
    source = RolloutDataSourceWithBuffer(args)
    before, trained, turns_begun = generated_tokens(engine), [], 0
    for rollout_id in range(6):
        output: Any = generate_rollout(args, rollout_id, source)
        trained += output.samples
        turns_begun += sum(len(sample.turns) > 1 for group in source.buffer for sample in group)
        assert output.metrics.get("rollout/over_sampling/discarded_tokens", 0) == 0
        source.save(rollout_id)
        source = RolloutDataSourceWithBuffer(args)
        source.load(rollout_id)
    assert turns_begun > 0  # some were interrupted in a later turn than their first
    assert sampled(trained) + sampled(source.buffer) == generated_tokens(engine) - before
    indices = [sample.index for group in trained + source.buffer for sample in group]
    assert sorted(indices) == list(range(len(indices)))
    for sample in (sample for group in trained for sample in group):
        sample.check()
        assert sample.turns == [] and sample.reward is not None
        assert sample.effective_response_length == (3 * TURN if sample.metadata["n"] % 2 == 0 else 3)


def test_a_tool_that_hangs_when_the_rollout_ends_is_asked_again_and_no_turn_is_lost(
    partial_args: Callable[..., Args], engine: EngineUnderTest
) -> None:
    args = partial_args("asks_a_tool", "--rollout-abort-timeout-s", "3")
    hanging.update({0, 3})
    tool_calls.clear()
    observations.clear()
    source = RolloutDataSourceWithBuffer(args)
    before = generated_tokens(engine)
    output: Any = generate_rollout(args, 0, source)
    (first, second) = [group for group in source.buffer if {0, 3} & {sample.index for sample in group}]
    waiting = [sample for sample in first + second if sample.index in (0, 3)]
    assert [sample.status for sample in waiting] == [SampleStatus.ABORTED] * 2
    assert [sample.response_length for sample in waiting] == [len(sample.turns[0]["tokens"]) for sample in waiting]
    assert output.metrics["rollout/over_sampling/discarded_tokens"] == 0
    again: Any = generate_rollout(args, 1, source)
    assert {0, 3} <= {sample.index for group in again.samples for sample in group}
    assert tool_calls.count(0) == tool_calls.count(3) == 2
    assert sampled(output.samples + again.samples + source.buffer) == generated_tokens(engine) - before


async def long_agent(base_url: str, sample: Sample) -> float:
    """Odd prompts: one short turn. Even ones: a turn, a tool that hangs the first time, and a turn."""
    is_long = sample.metadata["n"] % 2 == 0
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        first = await client.responses.create(model="m", input="hi", max_output_tokens=TURN if is_long else 3)
        if is_long:
            if sample.index in hanging:
                hanging.discard(sample.index)
                await asyncio.Event().wait()
            await client.responses.create(model="m", input="42", previous_response_id=first.id, max_output_tokens=TURN)
    return 1.0


def test_an_agent_that_hangs_in_a_tool_when_the_rollout_ends_starts_over_and_its_tokens_are_counted(
    partial_args: Callable[..., Args], engine: EngineUnderTest
) -> None:
    agent = ("--agent-function-path", f"{__name__}.long_agent", "--custom-generate-function-path")
    args = partial_args("three_turns", "--rollout-abort-timeout-s", "3", *agent, "slime.agent.generate.generate")
    hanging.update({0, 1})  # the first group
    source = RolloutDataSourceWithBuffer(args)
    before, trained, discarded = generated_tokens(engine), [], 0.0
    for rollout_id in range(4):
        output: Any = generate_rollout(args, rollout_id, source)
        trained += output.samples
        discarded += output.metrics.get("rollout/over_sampling/discarded_tokens", 0)
    assert discarded > 0 and not hanging
    assert sampled(trained) + sampled(source.buffer) + discarded == generated_tokens(engine) - before
    indices = [sample.index for group in trained + source.buffer for sample in group]
    assert sorted(indices) == list(range(len(indices)))
