"""The default rollout against a real engine, and its bookkeeping with generation functions of this file."""

from __future__ import annotations

import asyncio
import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.embedded_engine import EngineUnderTest
from helpers.settings import run_args

from slime.arguments import Args
from slime.observability.metrics import eval_metrics
from slime.rollout.data_source import RolloutDataSource
from slime.rollout.sglang_rollout import (
    GenerateState,
    RolloutFailed,
    generate_and_rm,
    generate_and_rm_group,
    generate_rollout,
    get_model_url,
)
from slime.utils.async_utils import run
from slime.utils.http_utils import close
from slime.utils.types import Sample, SampleStatus

CONTEXT = 32
MakeArgs = Callable[..., Args]


@pytest.fixture
def make_args(model: Path, tmp_path: Path) -> MakeArgs:
    """Settings with 4 prompts of 5 tokens, 2 samples each, and what a test adds."""
    rows = [{"input": f"{n}+{n}=?", "label": str(2 * n)} for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*flags: str) -> Args:
        base = {"--label-key": "label", "--rollout-batch-size": "4"}
        return run_args(model, tmp_path / "prompts.jsonl", base, "--colocate", *flags)

    return make


@pytest.fixture
def through(engine: EngineUnderTest) -> list[str]:
    """Flags that send requests to the engine itself, as to a router."""
    url = urlparse(engine.url)
    return ["--sglang-router-ip", str(url.hostname), "--sglang-router-port", str(url.port)]


def custom(name: str) -> list[str]:
    return ["--custom-generate-function-path", f"{__name__}.{name}"]


def evaluated(args: Args) -> dict[str, Any]:
    return generate_rollout(args, 0, RolloutDataSource(args), evaluation=True).data  # type: ignore[return-value]


# --- generation functions


async def answer(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample.append_response_tokens(args, tokens=[7, 8], log_probs=[-1.0, -2.0], text="x")
    sample.status = SampleStatus.COMPLETED
    return sample


async def answer_in_place(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """As plug-ins do: the lists of the sample itself are extended."""
    sample.tokens += [7, 8]
    sample.response_length = 2
    sample.reward = 1.0
    return sample


async def second_sample_breaks(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    await answer(args, sample, sampling_params)
    if sample.index is not None and sample.index % 2:
        sample.update_from_meta_info(args, {"finish_reason": {"type": "tea_break"}})
    return sample


async def fan_out(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> list[Sample]:
    return [await answer(args, Sample(index=sample.index, group_index=sample.group_index, tokens=[1]), {})]


async def counted(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    in_flight.append(sum(in_flight[-1:]) + 1)
    for _ in range(3):
        await asyncio.sleep(0)
    in_flight.append(in_flight[-1] - 1)
    return await answer_in_place(args, sample, sampling_params)


async def second_sample_raises(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    if sample.index is not None and sample.index % 2:
        raise KeyError("no such tool")
    return await answer(args, sample, sampling_params)


async def forgets_to_answer(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> None:
    """Returns nothing."""


in_flight: list[int] = []


async def group_raises(args: Args, samples: list[Sample], **kwargs: Any) -> list[float]:
    raise KeyError("no such answer")


async def score_as_dict(args: Args, sample: Sample, **kwargs: Any) -> dict[str, float]:
    return {"score": 1.0}


# --- the context


def test_a_response_ends_at_the_models_context(make_args: MakeArgs, through: list[str]) -> None:
    args = make_args(*through)  # --rollout-max-response-len 1024
    output = generate_rollout(args, 0, RolloutDataSource(args))
    samples = [sample for group in output.samples for sample in group]
    assert len(samples) == 8
    assert max(len(sample.tokens) for sample in samples) <= CONTEXT
    assert any(sample.status is SampleStatus.TRUNCATED for sample in samples)


def test_evaluation_has_a_context_of_its_own(make_args: MakeArgs, through: list[str], tmp_path: Path) -> None:
    sets = ("--eval-interval", "1", "--eval-prompt-data", "held", str(tmp_path / "prompts.jsonl"))
    data = evaluated(make_args(*through, *sets, "--eval-max-context-len", "12"))
    assert max(len(sample.tokens) for sample in data["held"]["samples"]) == 12


def test_a_prompt_that_leaves_no_room_fails_by_name(make_args: MakeArgs, through: list[str]) -> None:
    args = make_args(*through)
    sample = Sample(index=3, prompt="0" * 100)
    run(generate_and_rm(args, sample, GenerateState(args).sampling_params))
    assert sample.status is SampleStatus.FAILED
    assert "the prompt of sample 3 has 100 tokens" in sample.metadata["failure"]


# --- failures


def test_the_share_and_the_number_of_failures_are_reported(make_args: MakeArgs) -> None:
    args = make_args(*custom("second_sample_breaks"), "--max-failed-fraction", "0.5")
    output = generate_rollout(args, 0, RolloutDataSource(args))
    assert [len(group) for group in output.samples] == [1, 1, 1, 1]
    assert output.metrics == {"rollout/failed": 0.5, "rollout/num_failed": 4}


def test_a_finish_reason_that_is_not_known_is_a_failure(make_args: MakeArgs) -> None:
    args = make_args(*custom("second_sample_breaks"))
    with pytest.raises(RolloutFailed, match=r"[1-4] of 8 samples failed.*finish reason 'tea_break'"):
        generate_rollout(args, 0, RolloutDataSource(args))


def test_a_generation_function_that_raises_fails_its_samples_by_name(make_args: MakeArgs) -> None:
    args = make_args(*custom("second_sample_raises"), "--max-failed-fraction", "0.5")
    output = generate_rollout(args, 0, RolloutDataSource(args))
    assert output.metrics == {"rollout/failed": 0.5, "rollout/num_failed": 4}
    args = make_args(*custom("second_sample_raises"))
    says = r"[1-4] of 8 samples failed.*second_sample_raises, sample \d: raised KeyError: 'no such tool'"
    with pytest.raises(RolloutFailed, match=says):
        generate_rollout(args, 0, RolloutDataSource(args))


def test_a_generation_function_that_returns_no_sample_is_named(make_args: MakeArgs) -> None:
    args = make_args(*custom("forgets_to_answer"))
    says = "--custom-generate-function-path.*forgets_to_answer must return a Sample or a list of Samples, got None"
    with pytest.raises(ValueError, match=says):
        generate_rollout(args, 0, RolloutDataSource(args))


def test_an_answer_that_is_no_generation_fails_the_sample_with_what_was_answered(make_args: MakeArgs) -> None:
    async def generated_by(answer: Any) -> Sample:
        async def handler(request: web.Request) -> web.Response:
            return web.json_response(answer)

        app = web.Application()
        app.router.add_post("/generate", handler)
        async with TestServer(app) as server:
            args = make_args("--sglang-router-ip", "127.0.0.1", "--sglang-router-port", str(server.port))
            sample = Sample(index=3, prompt="1+1=?")
            await generate_and_rm(args, sample, GenerateState(args).sampling_params)
            await close()
            return sample

    stop = {"finish_reason": {"type": "stop"}}
    answers = [[], {"text": "x"}, {"text": "x", "meta_info": stop | {"output_token_logprobs": [[None, 1, None]]}}]
    for answer in answers:
        sample = run(generated_by(answer))
        assert sample.status is SampleStatus.FAILED
        assert "answered what is not a generation" in sample.metadata["failure"]
        assert sample.response_length == 0


def test_a_failure_of_samples_that_generation_made_is_told(make_args: MakeArgs) -> None:
    args = make_args(*custom("fan_out"), "--group-rm", "--custom-rm-path", f"{__name__}.group_raises")
    with pytest.raises(RolloutFailed, match=r"[2-8] of 8 samples failed.*no such answer"):
        generate_rollout(args, 0, RolloutDataSource(args))


def test_an_evaluation_sample_that_failed_counts_as_not_solved(make_args: MakeArgs, tmp_path: Path) -> None:
    path = str(tmp_path / "prompts.jsonl")
    sets = ("--eval-interval", "1", "--eval-prompt-data", "held", path, "--n-samples-per-eval-prompt", "2")
    scored = ("--custom-rm-path", f"{__name__}.score_as_dict", "--eval-reward-key", "score")
    data = evaluated(make_args(*custom("second_sample_breaks"), *sets, *scored, "--max-failed-fraction", "0.5"))
    assert [math.isnan(reward) for reward in data["held"]["rewards"]] == [False, True] * 4
    metrics = eval_metrics(data, 2)
    assert (metrics["eval/held"], metrics["eval/held-pass@1"], metrics["eval/held-pass@2"]) == (1.0, 0.5, 1.0)


def test_rewards_that_are_dicts_need_a_key_in_evaluation(make_args: MakeArgs, tmp_path: Path) -> None:
    sets = ("--eval-interval", "1", "--eval-prompt-data", "held", str(tmp_path / "prompts.jsonl"))
    args = make_args(*custom("answer"), *sets, "--custom-rm-path", f"{__name__}.score_as_dict")
    with pytest.raises(ValueError, match=r"keys \['score'\]. Name the one to report with --eval-reward-key"):
        evaluated(args)


# --- what samples and rollouts share


def test_samples_of_a_group_share_no_list(make_args: MakeArgs) -> None:
    args = make_args(*custom("answer_in_place"))
    group = [Sample(index=index, group_index=0, prompt="1+1=?") for index in range(3)]
    samples = run(generate_and_rm_group(args, group, {}))
    assert [len(sample.tokens) for sample in samples] == [7, 7, 7]


def test_requests_in_flight_are_bounded_over_all_calls_with_the_same_settings(make_args: MakeArgs) -> None:
    args = make_args(*custom("counted"), "--sglang-server-concurrency", "2")
    in_flight.clear()

    async def all_at_once() -> None:
        await asyncio.gather(*(generate_and_rm(args, Sample(index=n, prompt="1"), {}) for n in range(8)))

    run(all_at_once())
    assert max(in_flight) == 2
    assert in_flight[-1] == 0


def test_garbage_is_collected_as_often_as_before_after_several_evaluation_sets(
    make_args: MakeArgs, tmp_path: Path
) -> None:
    path = str(tmp_path / "prompts.jsonl")
    before = gc.get_threshold()
    evaluated(make_args(*custom("answer"), "--eval-interval", "1", "--eval-prompt-data", "a", path, "b", path))
    assert gc.get_threshold() == before


def test_plug_ins_find_each_model_by_its_name(make_args: MakeArgs) -> None:
    routers = {"student": ("a", 1), "judge": ("b", 2)}
    args = replace(make_args(), sglang_router_ip="a", sglang_router_port=1, sglang_model_routers=routers)
    assert get_model_url(args) == get_model_url(args, "student") == "http://a:1/generate"
    assert get_model_url(args, "judge", "/v1/models") == "http://b:2/v1/models"
    with pytest.raises(ValueError, match="no model 'ref' is served, there are student, judge"):
        get_model_url(args, "ref")
