"""Experts that a real engine sampled with: through pieces, conversations and files into a batch."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.embedded_engine import EngineUnderTest, running_engine
from helpers.settings import run_args
from helpers.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from slime.agent.conversation import Conversation
from slime.arguments import Args
from slime.data.batch import batch_from_samples
from slime.data.packed import pack_rows
from slime.rollout.data_source import RolloutDataSource
from slime.rollout.debug_data import load_rollout, save_rollout
from slime.rollout.routed_experts import Engines, read_experts, without_unrouted
from slime.rollout.sglang_rollout import GenerateState, generate, generate_rollout
from slime.rollout.turns import back_to_last_turn
from slime.utils.async_utils import run
from slime.utils.http_utils import close
from slime.utils.types import Sample, SampleStatus

MakeArgs = Callable[..., Args]
REPLAY = "--use-rollout-routing-replay"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "moe", "qwen3_moe", max_position_embeddings=256)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[EngineUnderTest]:
    with running_engine(model, "--num-threads", "1", "--enable-return-routed-experts") as running:
        yield running
        run(close())


@pytest.fixture
def make_args(model: Path, engine: EngineUnderTest, tmp_path: Path) -> MakeArgs:
    """Settings whose requests go to the engine, unless a test names another router."""
    rows = [{"input": [{"role": "user", "content": f"{n}+{n}=?"}]} for n in range(2)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*flags: str, url: str = engine.url, replay: str = REPLAY) -> Args:
        address = urlparse(url)
        router = ["--sglang-router-ip", str(address.hostname), "--sglang-router-port", str(address.port)]
        base = {"--rollout-max-response-len": "24"}
        return run_args(
            model, tmp_path / "prompts.jsonl", base, "--colocate", "--apply-chat-template", replay, *router, *flags
        )

    return make


def new_sample() -> Sample:
    return Sample(index=0, group_index=0, prompt="what is 17 + 25 ?")


def params(args: Args, **others: Any) -> dict[str, Any]:
    return GenerateState(args).sampling_params | {"ignore_eos": True} | others


def assert_as_transformers(sample: Sample, model: Path, num_rows: int | None = None) -> None:
    """Experts of all tokens but the last, or of the first `num_rows`."""
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = lm(torch.tensor([sample.tokens]), output_router_logits=True).router_logits
    expected = torch.stack([layer.topk(2).indices.sort().values for layer in logits], 1).numpy()
    sample.check()
    assert sample.rollout_routed_experts is not None
    assert sample.rollout_routed_experts.dtype == np.int16
    np.testing.assert_array_equal(
        np.sort(sample.rollout_routed_experts), expected[: num_rows or len(sample.tokens) - 1]
    )


def test_a_response_in_pieces_knows_each_piece_once(make_args: MakeArgs, model: Path) -> None:
    args, sample = make_args(), new_sample()
    run(generate(args, sample, params(args, max_new_tokens=5)))
    first = sample.rollout_routed_experts
    assert first is not None and len(first) == len(sample.tokens) - 1
    marked = first.copy()
    sample.rollout_routed_experts = marked  # as another version of the weights might have sampled
    marked[3] = 7
    sample.status = SampleStatus.ABORTED
    run(generate(args, sample, params(args, max_new_tokens=12)))
    assert sample.response_length == 12
    assert sample.rollout_routed_experts is not None
    assert (sample.rollout_routed_experts[3] == 7).all(), "what is known is not asked for again"
    sample.rollout_routed_experts[3] = first[3]
    assert_as_transformers(sample, model)


def test_evaluation_and_runs_without_replay_do_not_ask(make_args: MakeArgs) -> None:
    args, plain = make_args(), make_args(replay="--use-routing-replay")
    evaluated = run(generate(args, new_sample(), params(args), evaluation=True))
    sampled = run(generate(plain, new_sample(), params(plain)))
    assert evaluated.rollout_routed_experts is None and sampled.rollout_routed_experts is None


def test_turns_keep_their_experts_and_repeat_them(make_args: MakeArgs, model: Path) -> None:
    args, sample = make_args(), Sample(index=1, group_index=0, prompt=[{"role": "user", "content": "2+3=?"}])

    async def converse() -> None:
        conversation = Conversation(args, sample, params(args))
        await conversation.reply(max_tokens=6)
        conversation.add({"role": "user", "content": "sure?"})
        await conversation.reply(max_tokens=6)
        conversation.add({"role": "user", "content": "really?"})
        conversation._append_told()

    run(converse())
    num_sampled = sum(len(turn[part]) for turn in sample.turns for part in ("told", "tokens"))
    assert len(sample.tokens) > num_sampled
    assert_as_transformers(sample, model, num_sampled - 1)
    sample = Sample.from_dict(json.loads(json.dumps(sample.to_dict())))
    back_to_last_turn(sample)
    assert len(sample.tokens) == num_sampled
    assert_as_transformers(sample, model)


def test_a_conversation_that_goes_back_or_branches_forgets_what_came_after(make_args: MakeArgs, model: Path) -> None:
    args, sample = make_args(), Sample(index=2, group_index=0, prompt=[{"role": "user", "content": "2+3=?"}])

    async def converse() -> Conversation:
        conversation = Conversation(args, sample, params(args))
        await conversation.reply(max_tokens=6)
        conversation.add({"role": "user", "content": "sure?"})
        await conversation.reply(max_tokens=6)
        branch = conversation.branch(1)
        branch.add({"role": "user", "content": "why?"})
        await branch.reply(max_tokens=6)
        return branch

    branch = run(converse())
    assert_as_transformers(branch.sample, model)
    assert_as_transformers(sample, model)


def test_a_file_of_samples_brings_experts_back_as_they_were(make_args: MakeArgs, tmp_path: Path) -> None:
    args = make_args()
    groups = generate_rollout(args, 0, RolloutDataSource(args)).samples  # type: ignore[union-attr]
    template = str(tmp_path / "{rollout_id}.json")
    save_rollout(template, 0, groups, weight_version=1)
    read = load_rollout(template, 0)
    pairs = [
        (one, other) for group, again in zip(groups, read, strict=True) for one, other in zip(group, again, strict=True)
    ]
    assert len(pairs) == 4
    for one, other in pairs:
        assert one.rollout_routed_experts is not None and other.rollout_routed_experts is not None
        assert other.rollout_routed_experts.dtype == np.int16
        np.testing.assert_array_equal(one.rollout_routed_experts, other.rollout_routed_experts)


def sample_with(num_rows: int | None, mask: list[int] | None = None) -> Sample:
    """Two tokens of prompt, three of response."""
    experts = None if num_rows is None else np.arange(num_rows * 4, dtype=np.int32).reshape(num_rows, 2, 2)
    return Sample(
        group_index=0,
        index=0,
        tokens=[1, 2, 3, 4, 5],
        response_length=3,
        loss_mask=mask,
        rollout_routed_experts=experts,
    )


def test_a_batch_knows_experts_of_every_token_that_decides_on_a_trained_one() -> None:
    batch = batch_from_samples([sample_with(4), sample_with(3, [1, 1, 0]), sample_with(None, [0, 0, 0])], [0.0] * 3)
    assert batch.routed_experts is not None and batch.routed_experts.dtype == np.int16
    known = (batch.routed_experts >= 0).all(axis=(1, 2))
    assert known.tolist() == [True] * 4 + [False] + [True] * 3 + [False] * 7
    packed = pack_rows(batch, [1, 0], np.ones(9, dtype=np.float32))
    assert packed.routed_experts is not None
    assert packed.routed_experts[5:9].tolist() == np.arange(16).reshape(4, 2, 2).tolist()
    empty = pack_rows(batch, [], np.ones(9, dtype=np.float32))
    assert empty.routed_experts is not None and (empty.routed_experts == -1).all()
    for lacking in (sample_with(3), sample_with(None)):
        assert batch_from_samples([sample_with(4), lacking], [0.0] * 2).routed_experts is None


def test_experts_that_do_not_fit_their_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[at most 4, layers, experts of a token\]"):
        batch_from_samples([sample_with(5)], [0.0])
    with pytest.raises(ValueError, match="experts of 3 tokens, there must be 5"):
        sample_with(None).append_response_tokens(tokens=[6], routed_experts=np.zeros((3, 2, 2), dtype=np.int16))


def test_an_engine_that_does_not_tell_ends_the_run(make_args: MakeArgs) -> None:
    args = make_args()
    with pytest.raises(ValueError, match="an engine answered without routed_experts"):
        read_experts(args, new_sample(), {"finish_reason": {"type": "stop"}}, 2)
    fifth = base64.b64encode(np.array([0, 1, 2, 4], dtype=np.int32).tobytes()).decode()
    for encoded, message in (
        ("AAAAAA==", "told of 1 experts up to 0; 1 tokens in 2"),
        (fifth, "told of 4 .* up to 4;"),
    ):
        with pytest.raises(ValueError, match=message):
            read_experts(args, Sample(tokens=[1]), {"routed_experts": encoded}, 1)


def test_of_a_request_that_was_aborted_while_it_waited_only_tokens_with_experts_are_kept() -> None:
    meta_info = {"finish_reason": {"type": "abort"}, "output_token_logprobs": [[-1.0, 3, None]]}
    assert without_unrouted({"text": "x", "meta_info": meta_info})["meta_info"]["output_token_logprobs"] == []
    told = {"text": "x", "meta_info": meta_info | {"routed_experts": "AAAA"}}
    assert without_unrouted(told) is told


def test_a_lost_engine_is_left_for_one_that_is_there(make_args: MakeArgs, engine: EngineUnderTest) -> None:
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))  # and nobody listens, while it is ours
    workers = [{"url": f"http://127.0.0.1:{silent.getsockname()[1]}"}, {"url": engine.url}]
    sick = {"url": "http://127.0.0.1:9", "is_healthy": False}
    samples = [Sample(index=number, group_index=number, prompt="a") for number in range(6)]

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"workers": [*workers, sick]})

    async def through_a_router() -> None:
        application = web.Application()
        application.router.add_get("/workers", answer)
        async with TestServer(application) as router:
            args = make_args(url=str(router.make_url("/")))
            for sample in samples:
                await generate(args, sample, params(args, max_new_tokens=2))

    with silent:
        run(through_a_router())
    assert all(sample.response_length == 2 for sample in samples)


def test_requests_of_a_key_go_to_one_engine_until_it_is_much_busier_than_another(make_args: MakeArgs) -> None:
    engines, args = Engines(), make_args()
    engines._urls, engines._asked_at = ["http://a", "http://b"], float("inf")
    chosen = run(engines._choose(args, "7", set()))
    other = next(url for url in engines._urls if url != chosen)
    engines._num_requests[chosen] = 10
    assert run(engines._choose(args, "7", set())) == chosen
    engines._num_requests[chosen] = 11
    assert run(engines._choose(args, "7", set())) == other
