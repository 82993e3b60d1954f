"""Supervised fine-tuning through the same driver, without engines."""

from __future__ import annotations

import json

import pytest

from tests.e2e.cpu.helpers.runs import ENGINE, Starter

pytestmark = pytest.mark.slow


def test_sft_lowers_the_loss_of_the_turns_it_trains_on(start: Starter) -> None:
    data = start.folder / "chat.jsonl"
    row = {
        "label": "42",
        "messages": [
            {"role": "user", "content": "what is 17 + 25 ?"},
            {"role": "assistant", "content": "wrong", "step_loss_mask": 0},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "the answer is 42"},
        ],
    }
    data.write_text(4 * (json.dumps(row) + "\n"))
    run = start(
        *("--rollout-function-path", "slime.rollout.sft_rollout.generate_rollout", "--loss-type", "sft_loss"),
        *("--debug-train-only", "--no-colocate", "--actor-num-gpus-per-node", "2", "--n-samples-per-prompt", "1"),
        *(
            "--prompt-data",
            str(data),
            "--input-key",
            "messages",
            "--no-apply-chat-template",
            "--rollout-batch-size",
            "4",
        ),
        *("--num-rollout", "8", "--lr", "1e-2", "--loss-mask-type", "qwen3", "--calculate-per-token-loss"),
    ).reaches("metrics.jsonl")
    assert run.processes(ENGINE) == []
    run.succeeds()
    losses = [metrics["train/loss"] for metrics in run.metrics("train/step")]
    assert len(losses) == 8
    assert losses[-1] < losses[0] / 2
    run.leaves_nothing(within_s=5)
