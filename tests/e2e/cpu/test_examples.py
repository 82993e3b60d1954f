"""The example of an agent as a run of its own: the front inside the rollout process, trainers that learn from it."""

from __future__ import annotations

import pytest

from examples.prepare import prepare
from tests.e2e.cpu.helpers.runs import ROOT, Starter

pytestmark = pytest.mark.slow


def test_an_agent_on_the_openai_protocol_is_trained(start: Starter) -> None:
    folder = prepare(start.folder / "examples")
    run = start.bare(
        *("--config", str(ROOT / "examples" / "openai_agent" / "run.yaml"), "--run-dir", str(start.folder / "run")),
        *("--hf-checkpoint", str(folder / "model"), "--prompt-data", str(folder / "prompts.jsonl")),
        *("--update-weight-disk-dir", str(start.weights_root), "--entropy-coef", "0.01"),
    ).succeeds(240)
    first, second = run.metrics()
    assert first["rollout/num_failed"] == 0 and second["rollout/prefix_cache_hit_rate"] > 0
    assert all(metrics["train/grad_norm"] > 0 for metrics in run.metrics("train/step"))
    run.leaves_nothing()
