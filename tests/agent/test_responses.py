"""Agents written against `openai.OpenAI().responses`, run through the front: what they ask becomes samples."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from helpers.embedded_engine import EngineUnderTest
from helpers.scripted_engine import router_flags, scripted_engine

from slime.rollout.sglang_rollout import GenerateState, generate_and_rm
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.async_utils import run
from slime.utils.types import Sample, SampleStatus

QUESTION = "what is 17 + 25 ?"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": 25}}\n</tool_call>'
END = "<|im_end|>"
TOOLS = [{"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}, "strict": True}]
seen: dict[str, Any] = {}


def client_of(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60)


def generated(args: Any) -> list[Sample]:
    sample = Sample(index=7, group_index=0, prompt=[{"role": "user", "content": QUESTION}])
    output = run(generate_and_rm(args, sample, GenerateState(args).sampling_params))
    samples = output if isinstance(output, list) else [output]
    for member in samples:
        member.check()
    return samples


def agent(name: str) -> list[str]:
    return ["--agent-function-path", f"{__name__}.{name}"]


def trained_text(tokenizer: Any, sample: Sample) -> str:
    response = sample.tokens[-sample.response_length :]
    mask = sample.loss_mask or [1] * sample.response_length
    return str(tokenizer.decode([token for token, flag in zip(response, mask, strict=True) if flag]))


# --- agents


def chained(base_url: str, sample: Sample) -> float:
    """The state is held by the server."""
    client = client_of(base_url)
    first = client.responses.create(model="m", input=QUESTION, instructions="Be brief.", max_output_tokens=12)
    second = client.responses.create(
        model="m",
        input="and again?",
        instructions="Be brief.",
        previous_response_id=first.id,
        max_output_tokens=10,
    )
    seen["chained"] = first, second
    return 0.5


def by_hand(base_url: str, sample: Sample) -> float:
    """The agent holds the state, and gives back the items as they came."""
    client = client_of(base_url)
    items: list[Any] = [{"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}]
    items.append({"role": "user", "content": QUESTION})
    for _ in range(2):
        answer = client.responses.create(model="m", input=items, max_output_tokens=12)
        items += [*answer.output, {"role": "user", "content": "and again?"}]
    return 0.5


def calculator(base_url: str, sample: Sample) -> float:
    """The loop of OpenAI's guide to function calling."""
    client, items = client_of(base_url), [{"role": "user", "content": QUESTION}]
    while True:
        answer = client.responses.create(model="m", input=items, tools=TOOLS)
        items += answer.output
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            return float(answer.output_text == "the answer is 42")
        items += [_result(call) for call in calls]


def calculator_with_state(base_url: str, sample: Sample) -> float:
    client = client_of(base_url)
    answer = client.responses.create(model="m", input=QUESTION, tools=TOOLS)
    results = [_result(item) for item in answer.output if item.type == "function_call"]
    answer = client.responses.create(model="m", input=results, tools=TOOLS, previous_response_id=answer.id)
    return float(answer.output_text == "the answer is 42")


def _result(call: Any) -> Any:
    numbers = json.loads(call.arguments)
    return {"type": "function_call_output", "call_id": call.call_id, "output": str(numbers["a"] + numbers["b"])}


def branching(base_url: str, sample: Sample) -> None:
    client = client_of(base_url)
    first = client.responses.create(model="m", input=QUESTION, max_output_tokens=10)
    for _ in range(2):
        client.responses.create(model="m", input="sure?", previous_response_id=first.id, max_output_tokens=10)


def streaming(base_url: str, sample: Sample) -> None:
    client = client_of(base_url)
    seen["events"] = list(client.responses.create(model="m", input=QUESTION, tools=TOOLS, stream=True))
    with client.responses.stream(model="m", input=QUESTION, tools=TOOLS) as stream:
        seen["final"] = stream.get_final_response()


REFUSED = {
    "input must be a string or a list": {"input": []},
    "input item 0 lacks 'content'": {"input": [{"role": "user"}]},
    "input item 0: content must be text": {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    "input item 0: type 'reasoning' cannot be served": {"input": [{"type": "reasoning", "id": "r", "summary": []}]},
    "'resp_1' is not a response of this session": {"previous_response_id": "resp_1"},
    "tools must be functions": {"tools": [{"type": "web_search"}]},
    "tool_choice must be 'auto'": {"tool_choice": "required", "tools": TOOLS},
    "must be a number above 0, got -3": {"max_output_tokens": -3},
    "background cannot be served": {"background": True},
    "'json_object' cannot be enforced": {"text": {"format": {"type": "json_object"}}},
}


def asks_for_too_much(base_url: str, sample: Sample) -> None:
    client = client_of(base_url)
    for says, params in REFUSED.items():
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(**({"model": "m", "input": QUESTION} | params))
        seen.setdefault("refused", {})[says] = str(error.value)


# --- what becomes of them


@pytest.mark.parametrize(("name", "lengths"), [("chained", [12, 10]), ("by_hand", [12, 12])])
def test_a_conversation_of_responses_is_one_sample(
    make_args: Any, engine: EngineUnderTest, name: str, lengths: list[int]
) -> None:
    args = make_args(*agent(name), *router_flags(engine.url))
    (sample,) = generated(args)
    assert sample.reward == 0.5
    runs = "".join(map(str, sample.loss_mask or [])).split("0")
    assert [len(part) for part in runs if part] == lengths
    prompt = f"<|im_start|>system\nBe brief.{END}\n<|im_start|>user\n{QUESTION}{END}\n<|im_start|>assistant\n"
    assert tokenizer_of(args).decode(sample.tokens[: -sample.response_length]) == prompt


def test_log_probs_of_responses_are_those_of_the_tokens_as_they_stand(make_args: Any, engine: EngineUnderTest) -> None:
    (sample,) = generated(make_args(*agent("chained"), *router_flags(engine.url)))
    answer = engine.generate(
        input_ids=sample.tokens, return_logprob=True, logprob_start_len=0, sampling_params={"max_new_tokens": 1}
    )
    again = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]][-sample.response_length :]
    mask = sample.loss_mask or []
    expected = [log_prob if is_sampled else 0.0 for log_prob, is_sampled in zip(again, mask, strict=True)]
    assert sample.rollout_log_probs == pytest.approx(expected, abs=1e-4)


def test_usage_status_and_words_are_those_of_the_turn(make_args: Any, engine: EngineUnderTest) -> None:
    args = make_args(*agent("chained"), *router_flags(engine.url))
    (sample,) = generated(args)
    first, second = seen["chained"]
    assert (first.status, first.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert first.usage.output_tokens == 12 and second.usage.output_tokens == 10
    assert second.usage.total_tokens == len(sample.tokens)
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert sample.response.startswith(first.output_text) and sample.response.endswith(second.output_text)


@pytest.mark.parametrize("name", ["calculator", "calculator_with_state"])
def test_function_calls_reach_the_agent_and_their_outputs_the_policy(make_args: Any, name: str) -> None:
    tokenizer = tokenizer_of(make_args())
    says = f"Let me see.\n{CALL}"
    with scripted_engine(tokenizer, lambda text: "the answer is 42" if "tool\n42" in text else says) as (_, flags):
        (sample,) = generated(make_args(*agent(name), *flags, "--rollout-max-response-len", "300"))
    assert sample.reward == 1.0
    assert sample.response == f"{says}{END}\n<|im_start|>tool\n42{END}\n<|im_start|>assistant\nthe answer is 42{END}"
    assert trained_text(tokenizer, sample) == f"{says}{END}the answer is 42{END}"


def test_two_answers_to_one_response_are_siblings_that_train_on_it_once(
    make_args: Any, engine: EngineUnderTest
) -> None:
    samples = generated(make_args(*agent("branching"), *router_flags(engine.url)))
    assert [sample.rollout_id for sample in samples] == [7, 7]
    assert sorted(sum(sample.loss_mask or []) for sample in samples) == [10, 20]
    assert samples[0].tokens[:-10] == samples[1].tokens[:-10]


def test_a_streamed_response_is_the_same_in_pieces(make_args: Any) -> None:
    tokenizer = tokenizer_of(make_args())
    with scripted_engine(tokenizer, lambda text: f"Let me see.\n{CALL}") as (_, flags):
        generated(make_args(*agent("streaming"), *flags, "--rollout-max-response-len", "300"))
    events, final = seen["events"], seen["final"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Let me see."
    assert events[-1].type == "response.completed"
    words, call = events[-1].response.output
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert final.output_text == words.content[0].text == "Let me see."
    assert json.loads(final.output[1].arguments) == json.loads(call.arguments) == {"a": 17, "b": 25}


def test_what_responses_cannot_serve_is_refused_in_one_sentence(make_args: Any, engine: EngineUnderTest) -> None:
    (sample,) = generated(make_args(*agent("asks_for_too_much"), *router_flags(engine.url)))
    for says, message in seen["refused"].items():
        assert says in message
    assert len(seen["refused"]) == len(REFUSED)
    assert sample.status is SampleStatus.FAILED
