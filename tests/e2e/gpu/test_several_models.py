"""The policy and a model that stays as it is, each an SGLang engine on a GPU that it shares with a trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.cpu.helpers.runs import Starter
from tests.helpers.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, found {torch.cuda.device_count()}"),
]

WITHIN_S = 500.0
SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.02}
HALF_PRECISION = 0.05  # of a mean log-prob
REWARD = '''
"""The judge's mean log-prob of a response."""
from slime.rollout.sglang_rollout import get_model_url
from slime.utils.http_utils import post


async def reward(args, sample, **kwargs):
    body = {"input_ids": sample.tokens, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    answer = await post(get_model_url(args, "judge"), body | {"logprob_start_len": 0}, retry_for_s=60)
    entries = answer["meta_info"]["input_token_logprobs"][-sample.response_length:]
    return sum(entry[0] for entry in entries) / len(entries)
'''


def test_a_model_that_is_not_trained_has_its_weights_again_each_time_it_wakes_up(
    start: Starter, tmp_path: Path
) -> None:
    judge = make_tiny_model(tmp_path / "judge", seed=7, num_hidden_layers=3, **SHAPE)
    group = {"worker_type": "regular", "num_gpus": 1}
    entries = [
        {"name": "actor", "server_groups": [group]},
        {
            "name": "judge",
            "model_path": str(judge),
            "server_groups": [group | {"overrides": {"max_running_requests": 16}}],
        },
    ]
    (tmp_path / "engines.yaml").write_text(json.dumps({"sglang": entries}))
    (tmp_path / "judged.py").write_text(REWARD)
    run = start(
        *("--sglang-config", "engines.yaml", "--custom-rm-path", "judged.reward", "--actor-num-gpus-per-node", "2"),
        *("--num-rollout", "3"),
        cwd=tmp_path,
    ).succeeds(WITHIN_S)
    model = AutoModelForCausalLM.from_pretrained(judge).eval()
    for rollout_id in range(3):
        for sample in run.samples(rollout_id):
            tokens = torch.tensor(sample["tokens"])
            with torch.no_grad():
                log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])
            wanted = float(log_probs[-sample["response_length"] :].mean())
            assert sample["reward"] == pytest.approx(wanted, abs=HALF_PRECISION), rollout_id
            assert set(sample["weight_versions"]) == {str(rollout_id)}
    run.leaves_nothing()
