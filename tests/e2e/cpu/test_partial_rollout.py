"""Over-sampling, a filter, partial rollouts and every hook in one run behind the real router, ended and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cpu.helpers.runs import ENGINE, Run, Starter

pytestmark = pytest.mark.slow

PLUGIN = '''
"""Each hook leaves a line in calls.txt, in the working directory."""
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import generate


def called(name):
    with open("calls.txt", "a") as file:
        file.write(name + "\\n")


async def long_or_short(args, sample, sampling_params):
    length = 4 if sample.index % 8 < 4 else 150
    return await generate(args, sample, sampling_params | {"max_new_tokens": length, "ignore_eos": True})


async def reward(args, sample, **kwargs):
    return float(sample.index % 2)


def keep_all(args, samples, **kwargs):
    called("filter")
    return DynamicFilterOutput(keep=True)


def oldest(args, rollout_id, buffer, num_samples):
    called("buffer")
    return [buffer.pop(0) for _ in range(min(num_samples, len(buffer)))]


def hook(args, sample):
    called(f"hook {sample.index}")


def sample_filter(args, groups):
    called("sample_filter")


def all_samples(args, all_groups, data_source):
    called("all_samples")


def postprocess(args, rollout_id, rollout_data):
    called(f"postprocess {rollout_id} {len(rollout_data['advantages'])}")


def log(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    called(f"log {rollout_id} {len(samples)}")
    return rollout_id == 1


def log_eval(rollout_id, args, data, extra_metrics):
    called(f"log_eval {rollout_id} {list(data)}")
    return True
'''


def flags_of(name: str, folder: Path, prompts: Path) -> tuple[str, ...]:
    return (
        *("--over-sampling-batch-size", "4", "--partial-rollout", "--save-interval", "1", "--save", str(folder / name)),
        *("--custom-generate-function-path", "my.long_or_short", "--dynamic-sampling-filter-path", "my.keep_all"),
        *(
            "--custom-rm-path",
            "my.reward",
            "--buffer-filter-path",
            "my.oldest",
            "--rollout-sample-hook-path",
            "my.hook",
        ),
        *("--rollout-sample-filter-path", "my.sample_filter"),
        *("--rollout-all-samples-process-path", "my.all_samples"),
        *("--rollout-data-postprocess-path", "my.postprocess", "--custom-rollout-log-function-path", "my.log"),
        *("--custom-eval-rollout-log-function-path", "my.log_eval", "--eval-interval", "4"),
        *("--eval-prompt-data", "held", f"{prompts}@[:2]", "--rollout-max-response-len", "150"),
    )


def samples_of(run: Run, count: int) -> list[dict[str, Any]]:
    return [sample for rollout_id in range(count) for sample in run.samples(rollout_id)]


def test_a_partial_rollout_with_every_hook_goes_on_after_a_resume(start: Starter, prompts: Path) -> None:
    (start.folder / "my.py").write_text(PLUGIN)
    flags = flags_of("ckpt", start.folder, prompts)
    first = start(*flags, "--num-rollout", "2").succeeds()
    (buffer,) = [json.loads(path.read_text())["buffer"] for path in start.folder.glob("ckpt/rollout/*dict_1.pt")]
    assert buffer
    start(*flags, "--num-rollout", "4", "--resume").succeeds()
    samples = samples_of(first, 4)
    assert len(samples) == 32
    assert len({sample["index"] for sample in samples}) == 32
    assert {len(sample["rollout_log_probs"]) for sample in samples} == {4, 150}
    assert any(len(set(sample["weight_versions"])) > 1 for sample in samples)
    calls = (start.folder / "calls.txt").read_text().splitlines()
    hooked = [line for line in calls if line.startswith("hook")]
    assert {f"hook {sample['index']}" for sample in samples} <= set(hooked)
    for line in ("filter", "buffer", "sample_filter", "all_samples", "postprocess 3 8", "log 1 8", "log 3 8"):
        assert line in calls
    assert "log_eval 4 ['held']" in calls
    assert "rollout/raw_reward" not in first.metrics()[1]
    assert not any(first.metrics("eval/step"))
    start.runs[-1].leaves_nothing()


def test_an_engine_killed_between_partial_rollouts_costs_no_sample(start: Starter) -> None:
    (start.folder / "my.py").write_text(PLUGIN)
    run = start(
        *("--over-sampling-batch-size", "4", "--partial-rollout", "--num-rollout", "4"),
        *("--custom-generate-function-path", "my.long_or_short", "--custom-rm-path", "my.reward"),
        *("--rollout-max-response-len", "150"),
    ).reaches("record_000000.json")
    run.the_process(ENGINE).send_signal(signal.SIGKILL)
    run.succeeds()
    samples = samples_of(run, 4)
    assert len(samples) == len({sample["index"] for sample in samples}) == 32
    assert {len(sample["rollout_log_probs"]) for sample in samples} == {4, 150}
    assert (run.run_dir / "logs" / "engine_0_start_2.log").is_file()
