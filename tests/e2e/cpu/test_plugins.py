"""Plug-ins of a user's folder, found beside the working directory, and a router that somebody else runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slime.utils.async_utils import run as run_coroutine
from slime.utils.http_utils import find_free_port, get
from tests.e2e.cpu.helpers.runs import ROUTER, Starter

pytestmark = pytest.mark.slow

PLUGIN = '''
"""Generation that answers twice, a reward for groups, and a post-processing of rewards."""
from dataclasses import dataclass

from slime.rollout.data_source import RolloutDataSource
from slime.utils.http_utils import post


class Backwards(RolloutDataSource):
    """The prompts, last first."""

    def __init__(self, args):
        super().__init__(args)
        self.dataset.samples = self.dataset.samples[::-1]


async def generate(args, sample, sampling_params, evaluation=False):
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    output = await post(url, {"text": sample.prompt, "sampling_params": sampling_params, "return_logprob": True})
    meta = output["meta_info"]
    entries = meta["output_token_logprobs"]
    sample.tokens = [7, 8]
    sample.append_response_tokens(
        args, tokens=[e[1] for e in entries], log_probs=[e[0] for e in entries], meta_info=meta, text=output["text"]
    )
    sample.append_response_tokens(args, tokens=[9], trainable=False, text="!")
    return sample


async def group_reward(args, samples, **kwargs):
    return [{"place": float(place), "text": sample.response} for place, sample in enumerate(samples)]


def post_process(args, samples):
    rewards = [sample.get_reward_value(args) for sample in samples]
    return rewards, [reward - 1.5 for reward in rewards]
'''


def test_plug_ins_of_a_users_folder_take_part(start: Starter) -> None:
    mine = start.folder / "mine"
    mine.mkdir()
    (mine / "my_task.py").write_text(PLUGIN)
    run = start(
        *("--data-source-path", "my_task.Backwards", "--custom-generate-function-path", "my_task.generate"),
        *("--custom-rm-path", "my_task.group_reward", "--group-rm", "--reward-key", "place", "--num-rollout", "1"),
        *("--custom-reward-post-process-path", "my_task.post_process"),
        cwd=mine,
    ).succeeds()
    samples = run.samples(0)
    assert ["39+40=" in sample["prompt"] for sample in samples] == 4 * [True] + 4 * [False]
    assert all(sample["tokens"][:2] == [7, 8] and sample["loss_mask"][-1] == 0 for sample in samples)
    assert all(sample["response"].endswith("!") for sample in samples)
    (metrics,) = run.metrics()
    assert metrics["rollout/raw_reward"] == 1.5
    assert abs(metrics["rollout/advantages"]) < 1e-6


CONVERTER = """
def reward(args, sample, **kwargs):
    return 0.0


def convert(args, samples):
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": [float(place) for place, _ in enumerate(samples)],
        "loss_masks": [[1] + [0] * (sample.response_length - 1) for sample in samples],
    }
"""


def test_training_data_of_a_plug_in_is_what_is_trained_on(start: Starter) -> None:
    mine = start.folder / "mine"
    mine.mkdir()
    (mine / "my_data.py").write_text(CONVERTER)
    run = start(
        *("--custom-rm-path", "my_data.reward", "--custom-convert-samples-to-train-data-path", "my_data.convert"),
        *("--num-rollout", "1", "--calculate-per-token-loss"),
        cwd=mine,
    ).succeeds()
    num_samples = len(run.samples(0))
    (metrics,) = run.metrics()
    assert metrics["rollout/raw_reward"] == 0.0
    assert abs(metrics["rollout/advantages"] - (num_samples - 1) / 2) < 1e-5


def test_with_num_epoch_plug_ins_see_the_number_of_rollouts(start: Starter) -> None:
    mine = start.folder / "mine"
    mine.mkdir()
    (mine / "counting.py").write_text("async def reward(args, sample, **kwargs):\n    return float(args.num_rollout)\n")
    flags = start.default_flags("run")
    position = flags.index("--num-rollout")
    flags[position : position + 2] = ["--num-epoch", "1"]
    changes = ("--rollout-batch-size", "13", "--n-samples-per-prompt", "2", "--custom-rm-path", "counting.reward")
    run = start.bare(*flags, *changes, cwd=mine).succeeds()
    assert [metrics["rollout/raw_reward"] for metrics in run.metrics()] == [3.0, 3.0, 3.0]


def test_an_external_router_serves_the_run_and_outlives_it(start: Starter) -> None:
    port = find_free_port()
    command = ["-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    metrics_port = str(find_free_port())
    router = subprocess.Popen([sys.executable, *command, "--prometheus-port", metrics_port])
    try:
        url = f"http://127.0.0.1:{port}"
        run_coroutine(get(f"{url}/health", retry_for_s=30))
        run = start("--sglang-router-ip", "127.0.0.1", "--sglang-router-port", str(port)).reaches("record_000000.json")
        assert run.processes(ROUTER) == []
        assert len(run_coroutine(get(f"{url}/workers"))["workers"]) == 1
        run.succeeds()
        assert router.poll() is None
        run.leaves_nothing(within_s=5)
        assert run_coroutine(get(f"{url}/workers"))["workers"] == []
    finally:
        router.kill()
        router.wait()
