"""Faults in partial and fully asynchronous rollouts, tokens counted: bad answers, early ends, rewards that die."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web
from helpers.embedded_engine import EngineUnderTest
from helpers.scripted_engine import ScriptedEngine, router_flags, scripted_engine
from helpers.settings import run_args

from slime.arguments import Args
from slime.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer
from slime.rollout.fully_async_rollout import generate_rollout_fully_async, stop
from slime.rollout.sglang_rollout import generate, generate_rollout
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.async_utils import run
from slime.utils.types import Sample
from tests.e2e.cpu.helpers.runs import wait_for

SHORT, LONG, NUM_PROMPTS = 3, 100, 5
PARTIAL = ("--over-sampling-batch-size", "4", "--partial-rollout")
FULLY_ASYNC = ("--rollout-function-path", "slime.rollout.fully_async_rollout.generate_rollout_fully_async")
MODES = [(generate_rollout, PARTIAL), (generate_rollout_fully_async, FULLY_ASYNC)]
MakeArgs = Callable[..., Args]


@pytest.fixture
def make_args(model: Path, tmp_path: Path) -> MakeArgs:
    """Settings of 2 groups of 2 samples; every second prompt has short responses, the others long ones."""
    rows = [{"input": f"{n}+{n}=?", "metadata": {"is_long": n % 2 == 0}} for n in range(NUM_PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*flags: str) -> Args:
        base = {"--num-rollout": "3", "--rollout-num-gpus": "1", "--max-failed-fraction": "0.5"}
        generation = ("--custom-generate-function-path", f"{__name__}.long_or_short")
        return run_args(model, tmp_path / "prompts.jsonl", base, *generation, *flags)

    return make


class FivePrompts(RolloutDataSourceWithBuffer):
    """One epoch, and no more: then groups of the buffer only."""

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        fresh = max(0, num_samples - len(self.buffer))
        return super().get_samples(num_samples - fresh + min(fresh, NUM_PROMPTS - self.sample_group_index))


@pytest.fixture
def source() -> Iterator[Callable[[Args], RolloutDataSource]]:
    """Makes data sources; what was taken from them ends with the test."""
    sources: list[RolloutDataSource] = []

    def make(args: Args) -> RolloutDataSource:
        sources.append(FivePrompts(args))
        return sources[-1]

    yield make
    for made in sources:
        run(stop(made))


async def long_or_short(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    length = LONG if sample.metadata["is_long"] else SHORT
    return await generate(args, sample, sampling_params | {"max_new_tokens": length, "ignore_eos": True})


def waits_for_its_end(args: Args, sample: Sample, **kwargs: Any) -> float:
    """Its process is killed while it scores sample 2."""
    if sample.index == 2:
        Path(sample.metadata["flag"]).write_text(str(os.getpid()))
        threading.Event().wait()
    return 1.0


def flat(groups: list[list[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


def rollouts_until_the_end(function: Any, args: Args, data_source: Any) -> tuple[list[Sample], list[dict[str, float]]]:
    """All that is trained on until the data source has no more, and the metrics of each rollout."""
    trained, metrics = [], []
    for rollout_id in range(3):
        output = function(args, rollout_id, data_source)
        trained += flat(output.samples)
        metrics.append(output.metrics)
    with pytest.raises(ValueError, match="the data source gave no"):
        function(args, 3, data_source)
    for sample in trained:
        sample.check()
        assert sample.response_length == (LONG if sample.metadata["is_long"] else SHORT)
    return trained, metrics


@pytest.mark.parametrize(("function", "flags"), MODES)
def test_a_data_source_that_ends_early_has_every_sample_trained_on_and_every_token_sampled_once(
    make_args: MakeArgs, engine: EngineUnderTest, source: Any, function: Any, flags: tuple[str, ...]
) -> None:
    args = make_args(*flags, *router_flags(engine.url))
    before = generated_tokens(engine)
    trained, _ = rollouts_until_the_end(function, args, source(args))
    assert sorted(sample.index for sample in trained) == list(range(2 * NUM_PROMPTS))
    assert sum(sample.response_length for sample in trained) == generated_tokens(engine) - before


def generated_tokens(engine: EngineUnderTest) -> int:
    return int(engine.get("/server_info").json["counters"]["generated_tokens"])


@pytest.mark.parametrize(("function", "flags"), MODES)
def test_a_reward_process_that_is_killed_fails_its_sample_and_no_other(
    make_args: MakeArgs, engine: EngineUnderTest, source: Any, tmp_path: Path, function: Any, flags: tuple[str, ...]
) -> None:
    args = make_args(*flags, *router_flags(engine.url), "--custom-rm-path", f"{__name__}.waits_for_its_end")
    data_source, flag = source(args), tmp_path / "pid"
    for sample in data_source.dataset.samples:
        sample.metadata["flag"] = str(flag)

    def kill() -> None:
        wait_for(lambda: flag.is_file() and flag.read_text(), timeout_s=120, what="the reward of sample 2")
        psutil.Process(int(flag.read_text())).kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    before = generated_tokens(engine)
    trained, metrics = rollouts_until_the_end(function, args, data_source)
    killer.join(10)
    assert sorted([*(sample.index for sample in trained), 2]) == list(range(2 * NUM_PROMPTS))
    assert sum(entry["rollout/num_failed"] for entry in metrics) == 1
    assert sum(sample.response_length for sample in trained) + SHORT == generated_tokens(engine) - before


BROKEN: dict[str, Any] = {
    "no_json": lambda answer: web.Response(text="<html>it works</html>"),
    "an_error_in_its_body": lambda answer: web.json_response({"error": {"message": "out of cheese"}}),
    "log_probs_without_tokens": lambda answer: _without_tokens(answer),
    "no_finish_reason": lambda answer: _without(answer, "finish_reason"),
}


def _without_tokens(answer: dict[str, Any]) -> web.Response:
    answer["meta_info"]["output_token_logprobs"] = [[-0.5], [-0.5]]
    return web.json_response(answer)


def _without(answer: dict[str, Any], key: str) -> web.Response:
    del answer["meta_info"][key]
    return web.json_response(answer)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize(("function", "flags"), MODES)
def test_a_malformed_answer_fails_its_sample_and_no_other(
    make_args: MakeArgs,
    source: Any,
    monkeypatch: pytest.MonkeyPatch,
    function: Any,
    flags: tuple[str, ...],
    broken: str,
) -> None:
    answers: list[web.Response] = []
    sound = ScriptedEngine.generate

    async def third_is_broken(self: ScriptedEngine, request: web.Request) -> web.Response:
        answer = await sound(self, request)
        answers.append(answer)
        return BROKEN[broken](json.loads(answer.body)) if len(answers) == 3 else answer  # type: ignore[no-any-return]

    monkeypatch.setattr(ScriptedEngine, "generate", third_is_broken)
    with scripted_engine(tokenizer_of(make_args()), lambda text: "42") as (_, through):
        args = make_args(*flags, *through, "--custom-generate-function-path", "slime.rollout.sglang_rollout.generate")
        data_source = source(args)
        trained, failed = [], 0.0
        for rollout_id in range(3):
            output = function(args, rollout_id, data_source)
            trained += flat(output.samples)
            failed += output.metrics["rollout/num_failed"]
        run(stop(data_source))
    assert failed == 1
    indices = [sample.index for sample in trained]
    assert len(set(indices)) == len(indices) == 2 * NUM_PROMPTS - 1
