"""Reward functions and evaluation sets of a user's folder take part in a run."""

from __future__ import annotations

import json

import pytest

from tests.e2e.cpu.helpers.runs import Starter

pytestmark = pytest.mark.slow

GRADERS = '''
"""Written for other libraries; nothing of slime is imported."""
import os
import signal


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    signal.signal(signal.SIGALRM, lambda *_: None)  # graders with an alarm need a main thread
    return {"score": float(len(ground_truth)), "pid": os.getpid()}


def length_of_answers(prompts, completions, label, **kwargs):
    return [100.0 + len(right) for completion, right in zip(completions, label) if completion[0]["role"] == "assistant"]
'''


def test_graders_of_other_libraries_score_training_and_evaluation_sets(start: Starter) -> None:
    mine = start.folder / "mine"
    mine.mkdir()
    (mine / "graders.py").write_text(GRADERS)
    sets = [
        {"name": "graded", "n_samples_per_eval_prompt": 2},
        {"name": "other", "custom_rm_path": "graders.length_of_answers", "custom_rm_style": "trl"},
        {"name": "ruled", "rm_type": "exact_match", "max_response_len": 3},
    ]
    content = {"eval": {"datasets": [{"path": f"{start.prompts}@[0:2]"} | entry for entry in sets]}}
    (mine / "sets.yaml").write_text(json.dumps(content))
    run = start(
        *("--custom-rm-path", "graders.compute_score", "--custom-rm-style", "verl", "--reward-key", "score"),
        *("--eval-config", str(mine / "sets.yaml"), "--eval-interval", "1", "--num-rollout", "1"),
        cwd=mine,
    ).succeeds()
    samples = run.samples(0)
    assert all(sample["reward"]["score"] == len(sample["label"]) for sample in samples)
    assert len({sample["reward"]["pid"] for sample in samples} - {run.process.pid}) >= 1
    first, last = run.metrics("eval/step")
    for metrics in (first, last):
        assert "eval/graded-pass@2" in metrics
        assert metrics["eval/other"] == 100.0 + metrics["eval/graded"]
        assert metrics["eval/ruled"] == 0.0
        assert metrics["eval/ruled/response_len/max"] <= 3
    run.leaves_nothing()
