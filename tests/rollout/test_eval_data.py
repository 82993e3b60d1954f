"""Evaluation sets: what each samples, with what, and how it is scored, against a real engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from helpers.embedded_engine import EngineUnderTest
from helpers.settings import run_args

from slime.arguments import Args
from slime.cli.dry_run import plan
from slime.cli.preflight import preflight
from slime.observability.metrics import eval_metrics
from slime.rollout.data_source import RolloutDataSource
from slime.rollout.eval_data import SETTING_OF_KEY, eval_sets, samples_per_prompt
from slime.rollout.sglang_rollout import generate_rollout
from slime.utils.eval_config import KEYS
from slime.utils.types import Sample

MakeArgs = Callable[..., Args]
CONTEXT = 64


@pytest.fixture
def make_args(model: Path, tmp_path: Path) -> MakeArgs:
    """Settings whose --eval-config holds `sets` and `defaults`, with 3 prompts in PROMPTS of each."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"input": f"{n}+{n}=?", "label": str(2 * n), "other": "=" + str(n)} for n in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(sets: list[dict[str, Any]], defaults: dict[str, Any] | None = None, *flags: str) -> Args:
        content = {"eval": {"defaults": defaults or {}, "datasets": [{"path": str(prompts)} | entry for entry in sets]}}
        (tmp_path / "sets.yaml").write_text(json.dumps(content))  # JSON is YAML
        base = {
            "--label-key": "label",
            "--rollout-max-response-len": "8",
            "--eval-interval": "1",
            "--eval-config": str(tmp_path / "sets.yaml"),
            "--run-dir": str(tmp_path / "run"),
        }
        return run_args(model, prompts, base, "--colocate", *flags)

    return make


def longer_is_better(args: Any, sample: Sample, **kwargs: Any) -> dict[str, float]:
    return {"length": float(sample.response_length), "zero": 0.0}


async def never_called(args: Any, sample: Sample, **kwargs: Any) -> float:
    raise AssertionError


async def says_its_label(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample.append_response_tokens(tokens=[7], log_probs=[0.0], text=sample.label)
    sample.status = Sample.Status.COMPLETED
    return sample


def test_every_key_of_the_file_replaces_a_setting() -> None:
    assert set(SETTING_OF_KEY) == set(KEYS) - {"name", "path"}


def test_set_comes_before_defaults_before_eval_flags_before_rollout_flags(make_args: MakeArgs) -> None:
    flags = ("--eval-top-k", "5", "--rollout-top-p", "0.7", "--eval-temperature", "0.9")
    defaults = {"temperature": 0.4, "max_response_len": 6}
    a, b = eval_sets(make_args([{"name": "a", "temperature": 0}, {"name": "b"}], defaults, *flags))
    assert a.sampling_params == {"temperature": 0.0, "top_p": 0.7, "top_k": 5, "max_new_tokens": 6}
    assert b.sampling_params == {"temperature": 0.4, "top_p": 0.7, "top_k": 5, "max_new_tokens": 6}


def test_each_set_is_sampled_and_scored_as_it_says(make_args: MakeArgs, engine: EngineUnderTest) -> None:
    url = urlparse(engine.url)
    args = make_args(
        [
            {"name": "long", "custom_rm_path": f"{__name__}.longer_is_better", "reward_key": "length"},
            {"name": "short", "max_response_len": 2, "n_samples_per_eval_prompt": 4, "rm_type": "exact_match"},
            {
                "name": "other",
                "rm_type": "exact_match",
                "label_key": "other",
                "custom_generate_function_path": f"{__name__}.says_its_label",
            },
        ],
        {"min_new_tokens": 1},
        *("--sglang-router-ip", str(url.hostname), "--sglang-router-port", str(url.port)),
        *("--custom-rm-path", f"{__name__}.never_called"),
    )
    output = generate_rollout(args, 0, RolloutDataSource(args), evaluation=True)
    data: dict[str, Any] = output.data  # type: ignore[assignment]
    assert {name: len(entry["samples"]) for name, entry in data.items()} == {"long": 3, "short": 12, "other": 3}
    assert data["long"]["rewards"] == [float(sample.response_length) for sample in data["long"]["samples"]]
    assert max(data["long"]["rewards"]) > 2
    assert {sample.response_length for sample in data["short"]["samples"]} <= {1, 2}
    assert [sample.response for sample in data["other"]["samples"]] == ["=0", "=1", "=2"]
    metrics = eval_metrics(data, samples_per_prompt(args, data))
    assert metrics["eval/other"] == metrics["eval/other-pass@1"] == 1.0
    assert metrics["eval/short-pass@4"] == 0.0
    assert "eval/long-pass@2" not in metrics


def test_a_name_that_is_no_set_has_the_number_of_samples_of_the_flag(make_args: MakeArgs) -> None:
    args = make_args([{"name": "a", "n_samples_per_eval_prompt": 4}], None, "--n-samples-per-eval-prompt", "2")
    assert samples_per_prompt(args, ["a", "mine"]) == {"a": 4, "mine": 2}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"temperature": "hot"}, "set 'a': temperature must be float, got 'hot'"),
        ({"stop": "."}, "set 'a': stop must be a list, got '.'"),
        ({"n_samples_per_eval_prompt": 0}, "set 'a': --n-samples-per-eval-prompt must be above 0, got 0"),
        ({"max_prompt_len": 64}, "set 'a': max_prompt_len 64 must be below the context of 64 tokens"),
        ({"rm_type": "maths"}, "--rm-type must be"),
        ({"rm_type": "dapo"}, "name the entry to use with --eval-reward-key"),
        ({"label_key": "answer"}, "no key 'answer'"),
        ({"custom_rm_path": "nowhere.f"}, "--custom-rm-path: plug-in 'nowhere.f'"),
        ({"path": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_preflight_refuses_a_set_that_cannot_be_evaluated(
    make_args: MakeArgs, entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        preflight(make_args([{"name": "a"} | entry]))
    assert message in str(error.value)


def test_the_plan_names_every_set_with_its_samples(make_args: MakeArgs) -> None:
    args = make_args([{"name": "a", "n_samples_per_eval_prompt": 4}, {"name": "b"}])
    (data,) = [section for section in plan(args, preflight(args)) if section.title == "data"]
    assert data.rows[-2:] == [
        ("evaluation a", "3 prompts, 4 samples each"),
        ("evaluation b", "3 prompts, 1 samples each"),
    ]
