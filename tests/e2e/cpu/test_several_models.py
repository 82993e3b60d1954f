"""Two models at once: the policy, and one that stays as it is and scores what the policy samples."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.cpu.helpers.runs import ENGINE, Run, Starter
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

REWARD = '''
"""The judge's mean log-prob of a response."""
from slime.rollout.sglang_rollout import get_model_url
from slime.utils.http_utils import post


async def reward(args, sample, **kwargs):
    body = {"input_ids": sample.tokens, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    assert args.sglang_model_routers["judge"] != args.sglang_model_routers["student"]
    answer = await post(get_model_url(args, "judge"), body | {"logprob_start_len": 0}, retry_for_s=60)
    assert answer["meta_info"]["weight_version"] == "default"
    entries = answer["meta_info"]["input_token_logprobs"][-sample.response_length:]
    return sum(entry[0] for entry in entries) / len(entries)
'''


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A model of another depth and other weights."""
    return make_tiny_model(tmp_path / "judge", num_hidden_layers=3, seed=7)


def flags_of(folder: Path, **models: Path | None) -> list[str]:
    """Flags of a run that serves these models, one slot each, and is scored by the judge."""
    group = {"worker_type": "regular", "num_gpus": 1}
    entries = [
        {"name": name, "server_groups": [group]} | ({} if path is None else {"model_path": str(path)})
        for name, path in models.items()
    ]
    (folder / "engines.yaml").write_text(json.dumps({"sglang": entries}))
    (folder / "judged.py").write_text(REWARD)
    return ["--sglang-config", str(folder / "engines.yaml"), "--custom-rm-path", "judged.reward"]


def _scores(run: Run, rollout_id: int, judge: Path) -> tuple[list[float], list[float]]:
    """Rewards of a rollout, and what they should be."""
    model = AutoModelForCausalLM.from_pretrained(judge).eval()
    wanted = []
    samples = run.samples(rollout_id)
    for sample in samples:
        tokens = torch.tensor(sample["tokens"])
        with torch.no_grad():
            log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])
        wanted.append(float(log_probs[-sample["response_length"] :].mean()))
    return [sample["reward"] for sample in samples], wanted


def test_a_model_that_is_not_trained_scores_every_rollout_with_the_weights_it_came_with(
    start: Starter, judge: Path
) -> None:
    flags = flags_of(start.folder, student=None, judge=judge)
    run = start(
        *flags,
        *("--actor-num-gpus-per-node", "2", "--num-rollout", "3", "--check-weight-update-equal"),
        cwd=start.folder,
    )
    run.succeeds()
    for rollout_id in range(3):
        rewards, wanted = _scores(run, rollout_id, judge)
        assert rewards == pytest.approx(wanted, abs=1e-4)
        versions = {version for sample in run.samples(rollout_id) for version in sample["weight_versions"]}
        assert versions == {str(rollout_id)}, "the policy's engine has taken every update"
    logs = {path.name for path in (run.run_dir / "logs").iterdir()}
    assert {"engine_0_start_1.log", "judge_engine_1_start_1.log", "router.log", "router_judge.log"} <= logs
    run.leaves_nothing(within_s=5)


def test_an_engine_of_a_model_that_is_not_trained_comes_back_as_it_was(start: Starter, judge: Path) -> None:
    flags = [*flags_of(start.folder, judge=judge, student=None), "--rollout-num-gpus", "2"]
    common = [flag for flag in start.default_flags("run") if flag != "--colocate"]
    run = start.bare(*common, *flags, "--num-rollout", "6", cwd=start.folder).reaches("record_000000.json")
    (engine,) = [process for process in run.processes(ENGINE) if str(judge) in process.cmdline()]
    engine.send_signal(signal.SIGKILL)
    run.succeeds()
    assert (run.run_dir / "logs" / "judge_engine_0_start_2.log").is_file()
    rewards, wanted = _scores(run, 5, judge)
    assert rewards == pytest.approx(wanted, abs=1e-4)
    run.leaves_nothing(within_s=5)
