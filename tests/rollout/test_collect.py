"""Over-sampling, dynamic sampling and partial rollouts against a real engine, its tokens counted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from helpers.embedded_engine import EngineUnderTest
from helpers.settings import run_args

from slime.arguments import Args
from slime.config.base import ConfigError
from slime.rollout.base_types import RolloutFnTrainOutput
from slime.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import RolloutFailed, generate, generate_rollout, get_model_url
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.http_utils import get, post
from slime.utils.types import Sample, SampleStatus

SHORT, LONG = 3, 200
MakeArgs = Callable[..., Args]
Params = dict[str, Any]


@pytest.fixture
def make_args(model: Path, engine: EngineUnderTest, tmp_path: Path) -> MakeArgs:
    """Settings of 2 groups of 2 samples, of 12 prompts: every second one has short responses, the others long ones."""
    rows = [{"input": f"{n}+{n}=?", "metadata": {"n": n, "is_long": n % 2 == 0}} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = urlparse(engine.url)

    def make(*flags: str) -> Args:
        base = {
            "--custom-generate-function-path": f"{__name__}.long_or_short",
            "--sglang-router-ip": str(url.hostname),
            "--sglang-router-port": str(url.port),
            "--save": str(tmp_path),
            "--load": str(tmp_path),
        }
        return run_args(model, tmp_path / "prompts.jsonl", base, "--colocate", *flags)

    return make


def rollout(args: Args, rollout_id: int, source: RolloutDataSource) -> RolloutFnTrainOutput:
    output = generate_rollout(args, rollout_id, source)
    assert isinstance(output, RolloutFnTrainOutput)
    return output


def generated_tokens(engine: EngineUnderTest) -> int:
    return int(engine.get("/server_info").json["counters"]["generated_tokens"])


def flat(groups: list[list[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


def num_tokens(groups: list[list[Sample]]) -> int:
    return sum(sample.response_length for sample in flat(groups))


# --- plug-ins


async def long_or_short(args: Args, sample: Sample, sampling_params: Params) -> Sample:
    """Short responses come at once; long ones take long enough to be under way when the others have ended."""
    length = LONG if sample.metadata["is_long"] else SHORT
    return await generate(args, sample, sampling_params | {"max_new_tokens": length, "ignore_eos": True})


async def long_as_two(args: Args, sample: Sample, sampling_params: Params) -> list[Sample]:
    """Fans out: the generated sample and a copy of it."""
    twin = dataclasses.replace(sample, tokens=list(sample.tokens))
    return [await long_or_short(args, sample, sampling_params), await long_or_short(args, twin, sampling_params)]


async def long_is_in_a_tool(args: Args, sample: Sample, sampling_params: Params) -> Sample:
    if sample.metadata["is_long"] and sample.metadata["n"] not in returned:
        returned.add(sample.metadata["n"])
        sample.append_response_tokens(args, tokens=[5, 6], log_probs=[-1.0, -1.0])
        await asyncio.Event().wait()
    return await long_or_short(args, sample, sampling_params)


returned: set[int] = set()


async def interrupted_by_others(args: Args, sample: Sample, sampling_params: Params) -> Sample:
    """All requests are ended while the first one runs."""
    task = asyncio.ensure_future(long_or_short(args, sample, sampling_params))
    if not interrupted:
        interrupted.append(sample.index)
        url = get_model_url(args, endpoint="/server_info")
        start = (await get(url))["counters"]["generated_tokens"]
        while (await get(url))["counters"]["generated_tokens"] < start + 4:
            await asyncio.sleep(0)
        await post(get_model_url(args, endpoint="/abort_request"), {"abort_all": True})
    return await task


interrupted: list[int | None] = []


def keep_odd(args: Args, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    n = samples[0].metadata["n"]
    return DynamicFilterOutput(keep=n % 2 == 1, reason="even")


def keep_none(args: Args, samples: list[Sample], **kwargs: Any) -> bool:
    return False


def keep_where_needed(args: Args, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    return DynamicFilterOutput(keep=False, reason="dull", keep_when_insufficient=True)


def forgets_to_answer(args: Args, samples: list[Sample], **kwargs: Any) -> None:
    return None


async def count_groups(args: Args, samples: list[Sample], **kwargs: Any) -> list[float]:
    scored_groups.append(samples[0].metadata["n"])
    return [1.0] * len(samples)


scored_groups: list[int] = []


async def slow_for_short(args: Args, sample: Sample, **kwargs: Any) -> float:
    """A judge that never answers where n is 3, the first time."""
    if sample.metadata["n"] == 3 and sample.index not in judged:
        judged.add(sample.index)
        await asyncio.Event().wait()
    return 1.0


judged: set[int | None] = set()


class ThreePrompts(RolloutDataSource):
    """Has no more."""

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        return super().get_samples(min(num_samples, 3 - self.sample_offset))


# --- over-sampling


def test_the_first_groups_to_finish_are_kept_and_the_rest_is_discarded(make_args: MakeArgs) -> None:
    args = make_args("--over-sampling-batch-size", "4")
    source = RolloutDataSourceWithBuffer(args)
    output = rollout(args, 0, source)
    assert [sample.metadata["n"] for sample in flat(output.samples)] == [1, 1, 3, 3]
    assert source.get_buffer_length() == 0
    assert output.metrics is not None
    assert output.metrics["rollout/over_sampling/discarded_groups"] == 2
    assert 0 <= output.metrics["rollout/over_sampling/discarded_tokens"] < 4 * LONG


def test_fewer_over_sampled_prompts_than_wanted_are_refused(make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match="--over-sampling-batch-size 1 must be at least --rollout-batch-size 2"):
        make_args("--over-sampling-batch-size", "1")
    with pytest.raises(ConfigError, match="--mask-offpolicy-in-partial-rollout has no effect without --partial"):
        make_args("--mask-offpolicy-in-partial-rollout")


# --- dynamic sampling


def test_dropped_groups_are_replaced_and_counted_by_reason(make_args: MakeArgs) -> None:
    args = make_args("--dynamic-sampling-filter-path", f"{__name__}.keep_odd")
    output = rollout(args, 0, RolloutDataSource(args))
    assert [group[0].metadata["n"] for group in output.samples] == [1, 3]
    assert output.metrics is not None
    assert output.metrics["rollout/dynamic_filter/drop_even"] in (1, 2)  # the second draw: 3 may end before 2


def test_a_filter_that_keeps_nothing_ends_the_run_with_its_reasons(make_args: MakeArgs) -> None:
    bound = ("--dynamic-sampling-max-drop-ratio", "2")
    args = make_args("--dynamic-sampling-filter-path", f"{__name__}.keep_none", *bound)
    with pytest.raises(RolloutFailed, match=r"dropped 5 groups \(unspecified 5\) and kept 0 of 2"):
        rollout(args, 0, RolloutDataSource(args))


def test_a_group_may_be_kept_rather_than_drawing_again(make_args: MakeArgs) -> None:
    args = make_args(
        "--dynamic-sampling-filter-path", f"{__name__}.keep_where_needed", "--over-sampling-batch-size", "3"
    )
    output = rollout(args, 0, RolloutDataSource(args))
    assert len(output.samples) == 2
    assert output.metrics is not None
    assert output.metrics["rollout/dynamic_filter/drop_dull"] == 1


def test_a_filter_that_answers_nothing_is_named(make_args: MakeArgs) -> None:
    args = make_args("--dynamic-sampling-filter-path", f"{__name__}.forgets_to_answer")
    with pytest.raises(ValueError, match="forgets_to_answer must return DynamicFilterOutput or a bool, got None"):
        rollout(args, 0, RolloutDataSource(args))


def test_a_data_source_that_ends_early_gives_a_smaller_rollout_and_then_an_error(make_args: MakeArgs) -> None:
    args = make_args()
    source = ThreePrompts(args)
    assert [len(rollout(args, rollout_id, source).samples) for rollout_id in range(2)] == [2, 1]
    with pytest.raises(ValueError, match="the data source gave no samples"):
        rollout(args, 2, source)
    source.get_samples = lambda num_samples: None  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(ValueError, match="or its get_samples returns nothing"):
        rollout(args, 3, source)


# --- partial rollouts


def test_a_request_that_somebody_else_ended_goes_on(make_args: MakeArgs, engine: EngineUnderTest) -> None:
    interrupted.clear()
    args = make_args("--custom-generate-function-path", f"{__name__}.interrupted_by_others")
    before = generated_tokens(engine)
    output = rollout(args, 0, RolloutDataSource(args))
    lengths = [sample.response_length for sample in flat(output.samples)]
    assert lengths == [LONG, LONG, SHORT, SHORT]
    assert sum(lengths) == generated_tokens(engine) - before
    assert len(interrupted) == 1
    assert max(len(sample.weight_versions) for sample in flat(output.samples)) >= 2


def test_every_token_is_generated_once_and_none_is_lost_over_a_resume(
    make_args: MakeArgs, engine: EngineUnderTest
) -> None:
    args = make_args("--over-sampling-batch-size", "4", "--partial-rollout")
    source = RolloutDataSourceWithBuffer(args)
    before = generated_tokens(engine)
    trained: list[list[Sample]] = []
    for rollout_id in range(4):
        trained += rollout(args, rollout_id, source).samples
        source.save(rollout_id)
        source = RolloutDataSourceWithBuffer(args)
        source.load(rollout_id)
    assert len(trained) == 8
    assert num_tokens(trained) + num_tokens(source.buffer) == generated_tokens(engine) - before
    indices = [sample.index for sample in flat(trained + source.buffer)]
    assert sorted(indices) == list(range(len(indices)))
    for sample in flat(trained):
        sample.check()
        assert sample.reward is not None
        assert sample.response_length == (LONG if sample.metadata["is_long"] else SHORT)


def test_a_continued_response_has_its_segments_versions_and_the_text_of_its_tokens(
    make_args: MakeArgs, engine: EngineUnderTest
) -> None:
    args = make_args("--over-sampling-batch-size", "4", "--partial-rollout")
    source = RolloutDataSourceWithBuffer(args)
    rollout(args, 0, source)
    begun = {sample.index: list(sample.tokens) for sample in flat(source.buffer) if sample.response_length}
    assert begun
    answer = engine.post("/update_weights_from_disk", {"model_path": str(engine.model_path), "weight_version": "7"})
    assert answer.status == 200
    finished: list[Sample] = []
    for rollout_id in range(1, 4):
        finished += flat(rollout(args, rollout_id, source).samples)
    continued = [sample for sample in finished if sample.index in begun]
    assert continued
    for sample in continued:
        assert sample.tokens[: len(begun[sample.index])] == begun[sample.index]
        assert len(sample.weight_versions) >= 2 and sample.weight_versions[-1] == "7" != sample.weight_versions[0]
        assert sample.status is SampleStatus.TRUNCATED
        assert sample.response == tokenizer_of(args).decode(sample.tokens[-sample.response_length :])


def test_tokens_of_earlier_rollouts_can_be_masked(make_args: MakeArgs) -> None:
    args = make_args(
        *("--over-sampling-batch-size", "4", "--partial-rollout", "--mask-offpolicy-in-partial-rollout"),
    )
    source = RolloutDataSourceWithBuffer(args)
    rollout(args, 0, source)
    begun = {sample.index: sample.response_length for sample in flat(source.buffer)}
    later = [sample for rollout_id in (1, 2, 3) for sample in flat(rollout(args, rollout_id, source).samples)]
    continued = [sample for sample in later if begun.get(sample.index)]
    assert continued
    for sample in continued:
        assert sample.loss_mask is not None
        num_masked = sample.loss_mask.count(0)
        assert num_masked >= begun[sample.index] > 0
        assert sample.loss_mask == [0] * num_masked + [1] * (sample.response_length - num_masked)


def test_fanned_out_siblings_are_buffered_as_one_and_an_interrupted_one_starts_over(make_args: MakeArgs) -> None:
    args = make_args(
        *("--over-sampling-batch-size", "4", "--partial-rollout"),
        *("--custom-generate-function-path", f"{__name__}.long_as_two"),
    )
    source = RolloutDataSourceWithBuffer(args)
    output = rollout(args, 0, source)
    assert [len(group) for group in output.samples] == [4, 4]
    assert all(sample.response_length == 0 for sample in flat(source.buffer))
    lengths = [len(group) for rollout_id in (1, 2, 3) for group in rollout(args, rollout_id, source).samples]
    assert lengths == [4] * 6


def test_a_tool_that_does_not_return_is_left_behind_and_its_sample_starts_over(make_args: MakeArgs) -> None:
    returned.clear()
    args = make_args(
        *("--over-sampling-batch-size", "4", "--partial-rollout", "--rollout-abort-timeout-s", "0.2"),
        *("--custom-generate-function-path", f"{__name__}.long_is_in_a_tool"),
    )
    source = RolloutDataSourceWithBuffer(args)
    output = rollout(args, 0, source)
    assert [group[0].metadata["n"] for group in output.samples] == [1, 3]
    assert output.metrics is not None
    assert output.metrics["rollout/over_sampling/discarded_tokens"] == 4  # two groups of which one sample was inside
    again = flat(rollout(args, 1, source).samples)
    for sample in again:
        sample.check()


def test_a_hanging_judge_holds_up_no_abort_and_the_sample_is_scored_later(make_args: MakeArgs) -> None:
    judged.clear()
    args = make_args(
        *("--over-sampling-batch-size", "6", "--partial-rollout", "--custom-rm-path", f"{__name__}.slow_for_short"),
    )
    source = RolloutDataSourceWithBuffer(args)
    output = rollout(args, 0, source)
    assert [group[0].metadata["n"] for group in output.samples] == [1, 5]
    (waiting,) = [group for group in source.buffer if group[0].metadata["n"] == 3]
    assert [(sample.response_length, sample.reward) for sample in waiting] == [(SHORT, None)] * 2
    later = [group for rollout_id in (1, 2) for group in rollout(args, rollout_id, source).samples]
    (scored,) = [group for group in later if group[0].metadata["n"] == 3]
    assert [(sample.response_length, sample.reward) for sample in scored] == [(SHORT, 1.0)] * 2


def test_with_group_rm_a_group_is_scored_once_and_whole(make_args: MakeArgs) -> None:
    scored_groups.clear()
    args = make_args(
        *("--over-sampling-batch-size", "4", "--partial-rollout"),
        *("--custom-rm-path", f"{__name__}.count_groups", "--group-rm"),
    )
    source = RolloutDataSourceWithBuffer(args)
    groups = [group for rollout_id in range(3) for group in rollout(args, rollout_id, source).samples]
    assert len(groups) == 6
    scored = [group for group in source.buffer if group[0].reward is not None]
    assert sorted(scored_groups) == sorted(group[0].metadata["n"] for group in groups + scored)
