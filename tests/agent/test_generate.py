"""Agents written against the OpenAI client, run through the front: what they ask becomes samples."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import openai
import pytest
from helpers.embedded_engine import EngineUnderTest
from helpers.scripted_engine import ABORTED, router_flags, scripted_engine

from slime.rollout.data_source import RolloutDataSource
from slime.rollout.sglang_rollout import GenerateState, generate_and_rm, generate_rollout
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.async_utils import run
from slime.utils.types import Sample, SampleStatus

QUESTION = {"role": "user", "content": "what is 17 + 25 ?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
seen: dict[str, Any] = {}


def client_of(base_url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60, **options)


def ask(client: openai.OpenAI, messages: list[Any], **params: Any) -> Any:
    return client.chat.completions.create(model="policy", messages=messages, **params)


def agent(name: str) -> list[str]:
    return ["--agent-function-path", f"{__name__}.{name}"]


def generated(args: Any, **fields: Any) -> list[Sample]:
    sample = Sample(index=7, group_index=0, prompt=[QUESTION], **fields)
    output = run(generate_and_rm(args, sample, GenerateState(args).sampling_params))
    return output if isinstance(output, list) else [output]


# --- agents


def two_turns(base_url: str, sample: Sample) -> float:
    client, messages = client_of(base_url), list(sample.prompt)
    for _ in range(2):
        answer = ask(client, messages, max_tokens=12)
        messages += [answer.choices[0].message, {"role": "user", "content": "and again?"}]
    seen["usage"] = answer.usage
    return 0.5


told: dict[str, GenerateState] = {}


def told_to_end(base_url: str, sample: Sample) -> float:
    """The rollout ends while the agent is at its second turn."""
    client, messages = client_of(base_url), list(sample.prompt)
    messages += [ask(client, messages).choices[0].message, QUESTION]
    told["state"].is_aborted = True
    ask(client, messages)
    return 1.0


async def several_conversations(base_url: str, sample: Sample) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        first = await asyncio.gather(*(_say(client, [QUESTION]) for _ in range(2)))
        retold = [QUESTION, first[0], {"role": "user", "content": "sure?"}]
        await asyncio.gather(*(_say(client, retold) for _ in range(2)))


async def _say(client: openai.AsyncOpenAI, messages: list[Any]) -> Any:
    answer = await client.chat.completions.create(model="policy", messages=messages, max_tokens=10)
    return answer.choices[0].message


def calculator(base_url: str, sample: Sample) -> dict[str, float]:
    client, messages = client_of(base_url), list(sample.prompt)
    while True:
        message = ask(client, messages, tools=TOOLS).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return {"score": float(message.content == "the answer is 42")}
        for call in message.tool_calls:
            numbers = json.loads(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(numbers["a"] + numbers["b"])})


def streaming(base_url: str, sample: Sample) -> None:
    chunks = list(ask(client_of(base_url), [QUESTION], stream=True, max_tokens=6))
    seen["text"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    seen["finish"] = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]


def asks_for_too_much(base_url: str, sample: Sample) -> None:
    client = client_of(base_url)
    seen["models"] = [model.id for model in client.models.list()]
    for params in ({"n": 2, "messages": [QUESTION]}, {"messages": []}):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="policy", **params)
        seen.setdefault("refused", []).append(str(error.value))


def breaks(base_url: str, sample: Sample) -> None:
    raise KeyError("lost")


def says_nothing(base_url: str, sample: Sample) -> float:
    return 1.0


def never_ends(base_url: str, sample: Sample) -> None:
    seen["url"] = base_url
    ask(client_of(base_url), [QUESTION], max_tokens=4)
    threading.Event().wait(30)


# --- what becomes of them


def test_a_conversation_through_the_openai_client_is_one_sample(make_args: Any, engine: EngineUnderTest) -> None:
    (sample,) = generated(make_args(*agent("two_turns"), *router_flags(engine.url)))
    sample.check()
    assert sample.reward == 0.5 and sample.index == 7 and sample.group_index == 0
    runs = "".join(map(str, sample.loss_mask or [])).split("0")
    assert [len(part) for part in runs if part] == [12, 12]
    assert len(sample.weight_versions) == 2
    assert seen["usage"].completion_tokens == 12
    assert seen["usage"].total_tokens == len(sample.tokens)


def test_parallel_and_branching_conversations_are_siblings(make_args: Any, engine: EngineUnderTest) -> None:
    samples = generated(make_args(*agent("several_conversations"), *router_flags(engine.url)))
    assert [sample.rollout_id for sample in samples] == [7, 7, 7]
    for sample in samples:
        sample.check()
    first, second, branch = samples
    assert sum(first.loss_mask or []) == 20 and second.response_length == 10 and sum(branch.loss_mask or []) == 10
    assert first.tokens[:-10] == branch.tokens[:-10]
    assert first.tokens[-10:] != branch.tokens[-10:]  # asked twice, answered twice
    assert first.tokens != second.tokens


def test_tool_calls_reach_the_agent_and_their_results_the_policy(make_args: Any) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": 25}}\n</tool_call>'

    def policy(text: str) -> str:
        return "the answer is 42" if "tool\n42" in text else call

    tokenizer = tokenizer_of(make_args())
    with scripted_engine(tokenizer, policy) as (_, flags):
        (sample,) = generated(make_args(*agent("calculator"), *flags, "--rollout-max-response-len", "300"))
    assert sample.reward == {"score": 1.0}
    end = "<|im_end|>"
    assert sample.response == (f"{call}{end}\n<|im_start|>tool\n42{end}\n<|im_start|>assistant\nthe answer is 42{end}")
    response = sample.tokens[-sample.response_length :]
    trained = [token for token, flag in zip(response, sample.loss_mask or [], strict=True) if flag]
    assert tokenizer.decode(trained) == f"{call}{end}the answer is 42{end}"


def test_a_streamed_answer_is_the_same_in_pieces(make_args: Any, engine: EngineUnderTest) -> None:
    (sample,) = generated(make_args(*agent("streaming"), *router_flags(engine.url)))
    assert seen["text"] == sample.response and sample.response_length == 6
    assert seen["finish"] == "length"
    assert sample.reward in (0, 1)  # the agent gave none: --rm-type random did


def test_requests_that_cannot_be_served_are_refused_by_name(make_args: Any, engine: EngineUnderTest) -> None:
    seen.pop("refused", None)
    (sample,) = generated(make_args(*agent("asks_for_too_much"), *router_flags(engine.url)))
    assert seen["models"] == ["policy"]
    assert "n must be 1" in seen["refused"][0] and "at least one message" in seen["refused"][1]
    assert sample.status is SampleStatus.FAILED


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("breaks", "the agent raised KeyError: 'lost'"),
        ("says_nothing", "asked for no chat completion"),
        ("never_ends", "did not end within --agent-timeout-s 1"),
    ],
)
def test_an_agent_that_fails_fails_its_sample(make_args: Any, engine: EngineUnderTest, name: str, reason: str) -> None:
    (sample,) = generated(make_args(*agent(name), *router_flags(engine.url), "--agent-timeout-s", "1"))
    assert sample.status is SampleStatus.FAILED and reason in sample.metadata["failure"]


def test_an_agent_whose_turn_was_aborted_starts_over_and_its_tokens_are_counted(make_args: Any) -> None:
    says = iter(["hello", ABORTED, "hello", "world"])
    with scripted_engine(tokenizer_of(make_args()), lambda text: next(says)) as (played, flags):
        args = make_args(*agent("two_turns"), *flags)
        sample = Sample(index=7, group_index=0, prompt=[QUESTION])
        state = GenerateState(args)
        (finished,) = run(generate_and_rm(args, sample, state.sampling_params, state=state))  # type: ignore[misc]
    assert finished.status is SampleStatus.COMPLETED and finished.response.startswith("hello<|im_end|>")
    assert finished.response.endswith("world<|im_end|>") and len(finished.weight_versions) == 2
    assert finished.effective_response_length + state.num_lost_tokens == played.num_generated
    assert state.num_lost_tokens > 1 and finished.turns == []


def test_an_agent_that_was_told_to_end_is_its_prompt_again(make_args: Any) -> None:
    says = iter(["hello", ABORTED])
    with scripted_engine(tokenizer_of(make_args()), lambda text: next(says)) as (_, flags):
        args = make_args(*agent("told_to_end"), *flags)
        sample = Sample(index=7, group_index=0, prompt=[QUESTION])
        state = told["state"] = GenerateState(args)
        aborted = run(generate_and_rm(args, sample, state.sampling_params, state=state))
    assert aborted is sample and sample.status is SampleStatus.ABORTED and sample.rollout_id is None
    assert (sample.tokens, sample.response_length, sample.prompt) == ([], 0, [QUESTION])
    assert state.num_lost_tokens > 1


def test_a_session_that_is_over_answers_nothing(make_args: Any, engine: EngineUnderTest) -> None:
    generated(make_args(*agent("never_ends"), *router_flags(engine.url), "--agent-timeout-s", "1"))
    with pytest.raises(openai.NotFoundError, match="this session is over"):
        ask(client_of(seen["url"]), [QUESTION])


def test_a_whole_rollout_of_an_agent(make_args: Any, engine: EngineUnderTest) -> None:
    args = make_args(*agent("two_turns"), *router_flags(engine.url))
    (group,) = generate_rollout(args, 0, RolloutDataSource(args)).samples  # type: ignore[union-attr]
    assert [sample.reward for sample in group] == [0.5, 0.5]
    assert group[0].tokens != group[1].tokens
