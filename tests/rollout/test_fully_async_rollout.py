"""Rollouts that outlive their call: order, bounds, checkpoints, and weight updates in the middle of a response."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from helpers.embedded_engine import EngineUnderTest, running_engine
from helpers.settings import run_args
from helpers.tiny_models import make_tiny_model

from slime.arguments import Args
from slime.rollout import background
from slime.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer
from slime.rollout.fully_async_rollout import generate_rollout_fully_async as generate_rollout
from slime.rollout.fully_async_rollout import stop
from slime.rollout.sglang_rollout import RolloutFailed
from slime.rollout.sglang_rollout import generate as generate_one
from slime.utils.async_utils import run
from slime.utils.http_utils import close
from slime.utils.types import Sample, SampleStatus
from tests.e2e.cpu.helpers.runs import wait_for

LENGTH = 64  # tokens of each response of `fixed_length`
MakeArgs = Callable[..., Args]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make_args(model: Path, tmp_path: Path) -> MakeArgs:
    """Settings of 4 rollouts, 2 prompts x 2 samples each, and what a test adds."""
    rows = [{"input": f"{n}+{n}=?", "label": str(2 * n)} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(generation: str, *flags: str) -> Args:
        base = {
            "--label-key": "label",
            "--num-rollout": "4",
            "--rollout-num-gpus": "1",
            "--custom-generate-function-path": f"{__name__}.{generation}",
            "--save": str(tmp_path / "ckpt"),
        }
        return run_args(model, tmp_path / "prompts.jsonl", base, *flags)

    return make


@pytest.fixture
def source() -> Iterator[Callable[[Args], RolloutDataSource]]:
    """Makes data sources; what was taken from them ends with the test."""
    sources: list[RolloutDataSource] = []

    def make(args: Args) -> RolloutDataSource:
        sources.append(RolloutDataSourceWithBuffer(args))
        return sources[-1]

    GATES.clear()
    BEGUN.clear()
    yield make
    for made in sources:
        run(stop(made))


def indices(output: Any) -> list[int]:
    return [sample.index for group in output.samples for sample in group]


# --- generation functions

GATES: dict[int, asyncio.Event] = {}  # by sample index: where there is one, generation waits for it
BEGUN: list[int] = []


async def gated(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    assert sample.index is not None
    BEGUN.append(sample.index)
    if sample.index in GATES:
        await GATES[sample.index].wait()
    sample.append_response_tokens(args, tokens=[7, 8], log_probs=[-1.0, -2.0], text="x")
    sample.status = SampleStatus.COMPLETED
    return sample


async def third_breaks(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    await gated(args, sample, sampling_params)
    if sample.index == 2:
        sample.update_from_meta_info(args, {"finish_reason": {"type": "tea_break"}})
    return sample


async def sixth_breaks(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    await gated(args, sample, sampling_params)
    if sample.index == 6:
        sample.update_from_meta_info(args, {"finish_reason": {"type": "tea_break"}})
    return sample


async def sixth_raises(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    if sample.index == 6:
        raise KeyError("lost")
    return await gated(args, sample, sampling_params)


async def raises(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    raise KeyError("no such tool")


async def fixed_length(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    return await generate_one(args, sample, sampling_params | {"max_new_tokens": LENGTH, "ignore_eos": True})


# --- order and bounds


def test_every_batch_holds_the_prompts_that_a_synchronous_run_gives_it(make_args: MakeArgs, source: Any) -> None:
    args = make_args("gated")
    data_source = source(args)
    taken = [indices(generate_rollout(args, rollout_id, data_source)) for rollout_id in range(4)]
    assert taken == [[4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3] for n in range(4)]
    assert data_source.sample_index == 16  # nothing was begun beyond --num-rollout


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_groups_are_begun_as_far_ahead_as_the_staleness_bound_allows(
    make_args: MakeArgs, source: Any, bound: int
) -> None:
    args = make_args("gated", "--max-weight-staleness", str(bound))
    data_source = source(args)
    generate_rollout(args, 0, data_source)
    assert sorted(BEGUN) == list(range(4 * (1 + bound)))
    generate_rollout(args, 1, data_source)
    assert sorted(BEGUN) == list(range(4 * (2 + bound)))


def test_engines_that_were_not_updated_begin_nothing_new(make_args: MakeArgs, source: Any) -> None:
    args = make_args("gated", "--max-weight-staleness", "1")
    data_source = source(args)
    generate_rollout(args, 0, data_source, weight_version=0)
    generate_rollout(args, 1, data_source, weight_version=0)
    assert sorted(BEGUN) == list(range(8))


def test_a_long_response_keeps_its_place_while_later_groups_are_sampled(make_args: MakeArgs, source: Any) -> None:
    args = make_args("gated")
    data_source = source(args)
    GATES[1] = asyncio.Event()

    async def open_when_all_others_are_begun() -> None:
        while len(BEGUN) < 12:
            await asyncio.sleep(0.001)
        GATES[1].set()

    background = asyncio.run_coroutine_threadsafe(open_when_all_others_are_begun(), _loop())
    output = generate_rollout(args, 0, data_source)
    background.result(10)
    assert indices(output) == [0, 1, 2, 3]
    assert output.metrics["rollout/under_way/groups"] == 4
    assert output.metrics["rollout/under_way/done"] == 4


def _loop() -> asyncio.AbstractEventLoop:
    async def running() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    return run(running())


# --- failures


def test_failures_are_counted_in_the_batch_they_belong_to(make_args: MakeArgs, source: Any) -> None:
    args = make_args("third_breaks", "--max-failed-fraction", "0.25")
    data_source = source(args)
    first, second = (generate_rollout(args, rollout_id, data_source) for rollout_id in range(2))
    assert indices(first) == [0, 1, 3]
    assert (first.metrics["rollout/num_failed"], second.metrics["rollout/num_failed"]) == (1, 0)


def test_a_batch_with_too_many_failures_ends_the_run(make_args: MakeArgs, source: Any) -> None:
    args = make_args("third_breaks")
    with pytest.raises(RolloutFailed, match="1 of 4 samples failed.*'tea_break'"):
        generate_rollout(args, 0, source(args))


@pytest.mark.parametrize(
    ("generation", "says"),
    [("sixth_breaks", "1 of 4 samples failed"), ("sixth_raises", "sample 6: raised KeyError: 'lost'")],
)
def test_a_failure_among_later_groups_is_reported_before_their_batch_is_asked_for(
    make_args: MakeArgs, source: Any, monkeypatch: pytest.MonkeyPatch, generation: str, says: str
) -> None:
    monkeypatch.setattr(background, "_first", Future())
    args = make_args(generation)
    data_source = source(args)
    assert indices(generate_rollout(args, 0, data_source)) == [0, 1, 2, 3]
    with pytest.raises(RolloutFailed, match=says):
        background._first.result(10)
    with pytest.raises(RolloutFailed, match=says):
        generate_rollout(args, 1, data_source)


def test_what_a_plug_in_raises_ends_the_run_beyond_the_failures_allowed(make_args: MakeArgs, source: Any) -> None:
    args = make_args("raises")
    with pytest.raises(RolloutFailed, match="samples failed.*raised KeyError: 'no such tool'"):
        generate_rollout(args, 0, source(args))


def test_a_data_source_that_ends_gives_a_shorter_batch_and_then_a_sentence(make_args: MakeArgs, source: Any) -> None:
    args = make_args("gated")
    data_source = source(args)
    take = data_source.get_samples
    data_source.get_samples = lambda count: take(min(count, 3 - data_source.sample_group_index))
    assert [indices(generate_rollout(args, n, data_source)) for n in range(2)] == [[0, 1, 2, 3], [4, 5]]
    with pytest.raises(ValueError, match="gave no prompts for rollout 2"):
        generate_rollout(args, 2, data_source)


# --- checkpoints


def test_a_checkpoint_holds_what_is_under_way_and_nothing_is_sampled_twice(make_args: MakeArgs, source: Any) -> None:
    args = make_args("gated")
    data_source = source(args)
    GATES[6] = asyncio.Event()  # one group of rollout 1 is not done
    generate_rollout(args, 0, data_source)
    data_source.save(0)
    run(stop(data_source))
    del GATES[6]
    BEGUN.clear()

    resumed_args = make_args("gated", "--load", args.save)
    resumed = source(resumed_args)
    resumed.load(0)
    assert resumed.get_buffer_length() == 4
    outputs = [generate_rollout(resumed_args, rollout_id, resumed) for rollout_id in (1, 2, 3)]
    assert [indices(output) for output in outputs] == [[4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3] for n in (1, 2, 3)]
    assert sorted(BEGUN) == [6, 7, *range(12, 16)]
    assert all(sample.response_length == 2 for output in outputs for group in output.samples for sample in group)


def test_a_source_without_a_buffer_says_that_it_does_not_save_them(
    make_args: MakeArgs, caplog: pytest.LogCaptureFixture
) -> None:
    args = make_args("gated")
    data_source = RolloutDataSource(args)
    generate_rollout(args, 0, data_source)
    assert "RolloutDataSource does not save groups under way" in caplog.text
    run(stop(data_source))


# --- with an engine


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[EngineUnderTest]:
    with running_engine(model, "--num-threads", "1", "--weight-version", "0", "--min-step-ms", "20") as running:
        yield running
        run(close())


def generated_tokens(engine: EngineUnderTest) -> int:
    text = engine.get("/metrics").raw.decode()
    return int(re.search(r"^sglang:generation_tokens_total (\d+)", text, re.M)[1])  # type: ignore[index]


def test_a_weight_update_in_the_middle_of_responses_loses_and_repeats_no_token(
    make_args: MakeArgs, source: Any, engine: EngineUnderTest, model: Path
) -> None:
    url = urlparse(engine.url)
    through = ("--sglang-router-ip", str(url.hostname), "--sglang-router-port", str(url.port))
    args = make_args("fixed_length", *through, "--max-weight-staleness", "1", "--sglang-server-concurrency", "4")
    data_source = source(args)
    outputs = []
    for rollout_id in range(4):
        outputs.append(generate_rollout(args, rollout_id, data_source))
        if rollout_id < 3:  # a response takes more than a second
            done = 4 * LENGTH * (rollout_id + 1)
            wait_for(lambda done=done: generated_tokens(engine) > done, timeout_s=60, what="tokens of the next rollout")
        engine.post("/pause_generation", {"mode": "retract"})
        body = {"model_path": str(model), "weight_version": str(rollout_id + 1), "flush_cache": True}
        assert engine.post("/update_weights_from_disk", body).json["success"]
        engine.post("/continue_generation")

    assert generated_tokens(engine) == 16 * LENGTH
    for rollout_id, output in enumerate(outputs):
        samples = [sample for group in output.samples for sample in group]
        assert indices(output) == list(range(4 * rollout_id, 4 * rollout_id + 4))
        assert all(len(sample.rollout_log_probs) == sample.response_length == LENGTH for sample in samples)
        assert all(rollout_id - sample.oldest_weight_version in (0, 1) for sample in samples)
    # Four requests run at once: those of rollout 1 were in the middle when version 1 came.
    assert any(sample.weight_versions == ["0", "1"] for group in outputs[1].samples for sample in group)


def test_an_evaluation_runs_beside_the_groups_under_way(
    make_args: MakeArgs, source: Any, engine: EngineUnderTest, tmp_path: Path
) -> None:
    url = urlparse(engine.url)
    through = ("--sglang-router-ip", str(url.hostname), "--sglang-router-port", str(url.port))
    sets = ("--eval-interval", "1", "--eval-prompt-data", "held", str(tmp_path / "prompts.jsonl"))
    args = make_args("fixed_length", *through, *sets)
    data_source = source(args)
    first = generate_rollout(args, 0, data_source)
    evaluation = generate_rollout(args, 1, data_source, evaluation=True)
    second = generate_rollout(args, 1, data_source)
    assert len(evaluation.data["held"]["samples"]) == 8
    assert indices(first) + indices(second) == list(range(8))
