"""Conversations sampled by a real engine: tokens, masks, log-probs, and the engine's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.embedded_engine import EngineUnderTest, running_engine
from helpers.scripted_engine import router_flags, scripted_engine
from helpers.tiny_models import CHAT_TEMPLATE

from slime.agent.conversation import Conversation
from slime.arguments import Args
from slime.data.chat import following_text
from slime.ray.router import Router
from slime.rollout.sglang_rollout import GenerateState
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.async_utils import run
from slime.utils.types import Sample, SampleStatus

USER = {"role": "user", "content": "what is 17 + 25 ? " * 8}
MORE = {"role": "user", "content": "and again?"}
END = "<|im_end|>"


def conversation_on(args: Args, **fields: Any) -> Conversation:
    sample = Sample(index=0, prompt=[USER], **fields)
    return Conversation(args, sample, GenerateState(args).sampling_params)


def token_ids(args: Args, text: str) -> list[int]:
    ids: list[int] = tokenizer_of(args)(text, add_special_tokens=False)["input_ids"]
    return ids


async def two_turns(conversation: Conversation) -> list[int]:
    """Lengths of the response after the first turn and after the second."""
    await conversation.reply(max_tokens=20)
    conversation.add(MORE)
    await conversation.reply(max_tokens=20)
    return [mark.response_length for mark in conversation.marks]


def test_turns_are_trained_on_and_what_is_said_between_them_is_not(make_args: Any, engine: EngineUnderTest) -> None:
    args = make_args(*router_flags(engine.url))
    conversation = conversation_on(args)
    first, second = run(two_turns(conversation))
    sample = conversation.sample
    sample.check()
    between = token_ids(args, f"{END}\n<|im_start|>user\nand again?{END}\n<|im_start|>assistant\n")
    prompt = token_ids(args, f"<|im_start|>user\n{USER['content']}{END}\n<|im_start|>assistant\n")
    assert sample.tokens[: len(prompt)] == prompt
    assert sample.tokens[len(prompt) + first : len(prompt) + first + len(between)] == between
    assert sample.loss_mask == [1] * first + [0] * len(between) + [1] * (second - first - len(between))


def test_log_probs_of_all_turns_are_those_of_the_tokens_as_they_stand(make_args: Any, engine: EngineUnderTest) -> None:
    conversation = conversation_on(make_args(*router_flags(engine.url)))
    run(two_turns(conversation))
    sample = conversation.sample
    answer = engine.generate(
        input_ids=sample.tokens, return_logprob=True, logprob_start_len=0, sampling_params={"max_new_tokens": 1}
    )
    again = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]][-sample.response_length :]
    assert sample.rollout_log_probs is not None and sample.loss_mask is not None
    for told, log_prob, trained in zip(again, sample.rollout_log_probs, sample.loss_mask, strict=True):
        assert log_prob == (pytest.approx(told, abs=1e-4) if trained else 0.0)


def test_a_turn_that_ended_itself_is_not_ended_again(make_args: Any, model: Path) -> None:
    tokenizer = tokenizer_of(_Settings(str(model)))
    with scripted_engine(tokenizer, lambda text: "hello" if MORE["content"] not in text else "world") as (
        played,
        flags,
    ):
        args = make_args(*flags)
        conversation = conversation_on(args)
        assert run(conversation.reply()) == "hello"
        conversation.add(MORE)
        assert run(conversation.reply()) == "world"
    said = f"hello{END}\n<|im_start|>user\nand again?{END}\n<|im_start|>assistant\nworld{END}"
    assert conversation.sample.response == said
    assert conversation.sample.tokens == played.inputs[0] + token_ids(args, said)
    assert played.inputs[1] == conversation.sample.tokens[: len(played.inputs[1])]
    assert conversation.sample.status is SampleStatus.COMPLETED and conversation.can_go_on


def test_all_turns_share_the_budget_of_the_response(make_args: Any, engine: EngineUnderTest) -> None:
    conversation = conversation_on(make_args(*router_flags(engine.url), "--rollout-max-response-len", "48"))
    run(two_turns(conversation))
    conversation.add(MORE)
    assert run(conversation.reply()) == ""
    assert conversation.sample.response_length >= 48
    assert conversation.sample.status is SampleStatus.TRUNCATED and not conversation.can_go_on


def test_the_engine_finds_earlier_turns_in_its_cache(make_args: Any, engine: EngineUnderTest) -> None:
    conversation = conversation_on(make_args(*router_flags(engine.url)))
    run(conversation.reply(max_tokens=20))
    known = len(conversation.sample.tokens)
    before = conversation.sample.prefix_cache_info.cached_tokens
    conversation.add(MORE)
    run(conversation.reply(max_tokens=20))
    assert conversation.sample.prefix_cache_info.cached_tokens - before >= known - 32  # a page may be incomplete


def test_a_branch_trains_on_what_is_new_in_it_only(make_args: Any, engine: EngineUnderTest) -> None:
    conversation = conversation_on(make_args(*router_flags(engine.url)))
    first, _ = run(two_turns(conversation))
    before = list(conversation.sample.tokens)
    branch = conversation.branch(1)
    branch.add({"role": "user", "content": "no!"})
    run(branch.reply(max_tokens=5))
    branch.sample.check()
    assert branch.sample.loss_mask is not None
    assert branch.sample.loss_mask[:first] == [0] * first and sum(branch.sample.loss_mask) == 5
    assert conversation.sample.tokens == before


def test_rewinding_takes_back_all_since_the_last_reply(make_args: Any, engine: EngineUnderTest) -> None:
    conversation = conversation_on(make_args(*router_flags(engine.url)))
    run(conversation.reply(max_tokens=5))
    state = conversation.sample.to_dict()
    conversation.add(MORE)
    conversation._append_told()
    conversation.rewind()
    assert conversation.sample.to_dict() == {**state, "loss_mask": [1] * 5}
    assert len(conversation.messages) == 2


def test_what_comes_before_the_first_reply_belongs_in_the_prompt(make_args: Any) -> None:
    with pytest.raises(ValueError, match="belongs in the prompt"):
        conversation_on(make_args()).add(MORE)


def test_turns_of_a_conversation_reach_one_engine_through_the_router(
    make_args: Any, engine: EngineUnderTest, model: Path, tmp_path: Path
) -> None:
    flags = ("--router-policy", "manual")
    router = Router(make_args(*flags), host="127.0.0.1", log_dir=tmp_path)
    router.start()
    try:
        with running_engine(model, "--num-threads", "1") as second:
            args = make_args(*flags, *router_flags(router.url))
            run(_register(router, engine.url, second.url))
            for _ in range(6):
                conversation = conversation_on(args)
                conversation.sample.prompt = ""
                run(conversation.reply(max_tokens=20))
                known = len(conversation.sample.tokens)
                before = conversation.sample.prefix_cache_info.cached_tokens
                conversation.add(MORE)
                run(conversation.reply(max_tokens=4))
                assert conversation.sample.prefix_cache_info.cached_tokens - before >= known - 32
    finally:
        router.stop()


async def _register(router: Router, *urls: str) -> None:
    await router.wait_until_up()
    for url in urls:
        await router.add(url)


def test_the_text_between_turns_is_found_where_templates_render_earlier_turns_otherwise(model: Path) -> None:
    tokenizer = tokenizer_of(_Settings(str(model)))
    thinking = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ '<think>\n\n</think>\n\n' if loop.last and message.role == 'assistant' }}{{ message['content'] }}",
    )
    text = following_text(_with_template(tokenizer, thinking), [USER], [MORE])
    assert text == f"{END}\n<|im_start|>user\nand again?{END}\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="does not show an assistant turn"):
        following_text(_with_template(tokenizer, "{{ messages | length }}"), [USER], [MORE])


class _Settings:
    trust_remote_code = False

    def __init__(self, hf_checkpoint: str) -> None:
        self.hf_checkpoint = hf_checkpoint


def _with_template(tokenizer: Any, template: str) -> Any:
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    other.chat_template = template
    return other
