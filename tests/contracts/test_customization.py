"""The examples of docs/customization.md, run as they stand there, from a folder outside the package."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from helpers.embedded_engine import EngineUnderTest

from slime.arguments import Args, parse_args
from slime.cli.preflight import PLUGINS
from slime.config.base import flag_of
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, call_rollout_fn
from slime.rollout.hooks import logs_eval_itself, logs_rollout_itself
from slime.utils.async_utils import run
from slime.utils.http_utils import close
from slime.utils.misc import load_function
from slime.utils.types import Sample, SampleStatus

PAGE = (Path(__file__).parents[2] / "docs" / "customization.md").read_text()
ALGORITHMS = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)[^\n]*\n(.*?)```", PAGE, flags=re.DOTALL))
DOCUMENTED = {
    "slime.rollout.base_types",
    "slime.rollout.data_source",
    "slime.rollout.filter_hub.base_types",
    "slime.rollout.sglang_rollout",
    "slime.utils.async_utils",
    "slime.utils.http_utils",
}
RESPONSE_LENGTH = 6
MakeArgs = Callable[..., Args]


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of the page in the working directory, which is on the path, as with `slime train`."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    run(close())


@pytest.fixture
def make_args(engine: EngineUnderTest, tmp_path: Path) -> MakeArgs:
    """Settings of 2 groups of 2 samples, and what a test adds."""
    rows = [{"input": f"{n}+{n}=", "label": str(2 * n)} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = urlparse(engine.url)

    def make(*flags: str) -> Args:
        base = {
            "--train-backend": "fsdp",
            "--hf-checkpoint": str(engine.model_path),
            "--prompt-data": "prompts.jsonl",
            "--label-key": "label",
            "--rollout-batch-size": "2",
            "--n-samples-per-prompt": "2",
            "--num-rollout": "1",
            "--actor-num-gpus-per-node": "1",
            "--rollout-max-response-len": str(RESPONSE_LENGTH),
            "--custom-rm-path": "my_reward.score",
            "--sglang-router-ip": str(url.hostname),
            "--sglang-router-port": str(url.port),
        }
        return parse_args([part for item in base.items() for part in item] + ["--colocate", *flags])

    return make


def rollout(args: Args, source: Any = None) -> list[list[Sample]]:
    """The groups of rollout 3, as a run gets them."""
    source = source or load_function(args.data_source_path)(args)
    output = call_rollout_fn(load_function(args.rollout_function_path), args, 3, source, evaluation=False)
    assert isinstance(output, RolloutFnTrainOutput)
    return output.samples


def flat(groups: list[list[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


def test_every_hook_of_a_run_is_on_the_page() -> None:
    flags = [flag_of(name) for name in PLUGINS] + ["--rollout-sample-hook-path"]
    assert [flag for flag in flags if flag not in PAGE + ALGORITHMS] == []


def test_the_examples_import_documented_paths_only() -> None:
    imported = {
        node.module
        for text in FILES.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert {name for name in imported if name.startswith("slime")} == DOCUMENTED


def test_a_rollout_function_may_return_the_bare_forms(make_args: MakeArgs, tmp_path: Path) -> None:
    args = make_args(
        *("--rollout-function-path", "my_rollout.generate_rollout", "--eval-interval", "1"),
        *("--eval-prompt-data", "held", "prompts.jsonl"),
    )
    assert [len(group) for group in rollout(args)] == [2, 2]
    function = load_function(args.rollout_function_path)
    output = call_rollout_fn(function, args, 0, None, evaluation=True)
    assert isinstance(output, RolloutFnEvalOutput)
    assert len(output.data["held"]["rewards"]) == 8


def test_a_rollout_of_the_users_own_is_made_of_the_same_parts(make_args: MakeArgs) -> None:
    args = make_args("--rollout-function-path", "my_parts.generate_rollout")
    source = load_function(args.data_source_path)(args)
    groups = rollout(args, source)
    assert len(groups) >= 2
    assert len(groups) + source.get_buffer_length() == 4
    assert all(sample.reward is not None for sample in flat(groups))


def test_generation_with_a_tool_masks_what_was_not_sampled(make_args: MakeArgs) -> None:
    samples = flat(rollout(make_args("--custom-generate-function-path", "my_generate.with_tool")))
    assert all(sample.loss_mask == [1] * (sample.response_length - 2) + [0, 0] for sample in samples)
    assert all(sample.response.endswith("=4") and sample.tokens[-2:] == [5, 6] for sample in samples)


def test_generation_by_hand_posts_to_the_router(make_args: MakeArgs) -> None:
    samples = flat(rollout(make_args("--custom-generate-function-path", "my_generate.by_hand")))
    assert all(sample.tokens[:2] == [7, 8] and sample.response_length <= RESPONSE_LENGTH for sample in samples)
    for sample in samples:
        sample.check()


def test_generation_may_fan_out_to_siblings(make_args: MakeArgs) -> None:
    groups = rollout(make_args("--custom-generate-function-path", "my_generate.two_answers"))
    assert [len(group) for group in groups] == [4, 4]
    assert [[sample.rollout_id for sample in group] for group in groups] == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert all(groups[0][n].tokens != groups[0][n + 1].tokens for n in (0, 2))


def test_rewards_are_numbers_dicts_or_come_by_group(make_args: MakeArgs) -> None:
    assert all(sample.reward in (0.0, 1.0) for sample in flat(rollout(make_args())))
    args = make_args("--custom-rm-path", "my_reward.score_as_dict", "--reward-key", "length")
    assert all(sample.get_reward_value(args) == sample.response_length for sample in flat(rollout(args)))
    groups = rollout(make_args("--custom-rm-path", "my_reward.rank", "--group-rm"))
    assert [sorted(sample.reward for sample in group) for group in groups] == [[0.0, 1.0]] * 2


def test_a_filter_answers_in_either_form(make_args: MakeArgs) -> None:
    args = make_args(
        *("--dynamic-sampling-filter-path", "my_filter.mixed", "--custom-rm-path", "my_reward.rank", "--group-rm"),
    )
    assert len(rollout(args)) == 2
    args = make_args("--dynamic-sampling-filter-path", "my_filter.short", "--dynamic-sampling-max-drop-ratio", "1")
    with pytest.raises(RuntimeError, match="dropped 3 groups .unspecified 3. and kept 0 of 2"):
        rollout(args)


def test_a_buffer_filter_chooses_what_goes_first(make_args: MakeArgs) -> None:
    args = make_args("--buffer-filter-path", "my_buffer.newest_first")
    source = load_function(args.data_source_path)(args)
    source.add_samples(source.get_samples(4))
    assert [group[0].index for group in rollout(args, source)] == [6, 4]


def test_sample_hooks_see_every_scored_sample_in_turn(make_args: MakeArgs) -> None:
    flag = "--rollout-sample-hook-path"
    args = make_args(flag, "my_samples.note", flag, "my_samples.shorten")
    assert args.rollout_sample_hook_path == ["my_samples.note", "my_samples.shorten"]
    samples = flat(rollout(args))
    assert [sample.metadata["seen"] for sample in samples] == [{"rollout_id": 3, "evaluation": False}] * 4


def test_a_sample_filter_removes_and_a_process_sees_all_groups(make_args: MakeArgs) -> None:
    args = make_args(
        *("--rollout-sample-filter-path", "my_samples.without_truncated"),
        *("--rollout-all-samples-process-path", "my_samples.count"),
    )
    source = load_function(args.data_source_path)(args)
    samples = flat(rollout(args, source))
    assert any(sample.remove_sample for sample in samples)
    assert [sample.remove_sample for sample in samples] == [s.status is SampleStatus.TRUNCATED for s in samples]
    assert source.get_metadata() == {"num_groups": 2}


def test_a_data_source_of_the_users_own_gives_the_prompts(make_args: MakeArgs) -> None:
    groups = rollout(make_args("--data-source-path", "my_data.Backwards"))
    assert [group[0].prompt for group in groups] == ["7+7=", "6+6="]


def test_log_functions_decide_whether_slime_logs_too(make_args: MakeArgs, tmp_path: Path) -> None:
    args = make_args(
        *("--custom-rollout-log-function-path", "my_log.rollout"),
        *("--custom-eval-rollout-log-function-path", "my_log.evaluation"),
    )
    assert not logs_rollout_itself(args, 3, flat(rollout(args)), extra_metrics={}, seconds=1.0)
    assert (tmp_path / "my_log.txt").read_text() == "3: 4 samples\n"
    assert logs_eval_itself(args, 0, {"held": {"rewards": [0.0, 1.0]}}, {})
    assert (tmp_path / "my_eval_0.txt").read_text() == "held 2"


def test_post_processing_and_conversion_have_the_documented_forms(make_args: MakeArgs) -> None:
    args = make_args()
    samples = flat(rollout(args))
    raw_rewards, rewards = load_function("my_training.post_process")(args, samples)
    assert [raw - 0.5 for raw in raw_rewards] == rewards
    data = load_function("my_training.convert")(args, samples)
    assert {key: len(values) for key, values in data.items()} == dict.fromkeys(data, 4)
