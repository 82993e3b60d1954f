"""One trainer and one engine that share their slot: the whole control path in one run."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.cpu.helpers.runs import Starter

DOCUMENTED_METRICS = {
    "rollout/step": {
        "rollout/raw_reward", "rollout/rewards", "rollout/advantages", "rollout/response_lengths",
        "rollout/total_lengths", "rollout/truncated", "rollout/truncated_ratio", "rollout/repetition_frac",
        "rollout/response_len/mean",
        "rollout/response_len/median", "rollout/response_len/max", "rollout/response_len/min", "perf/rollout_time",
        "perf/tokens_per_gpu_per_sec", "perf/longest_sample_tokens_per_sec", "perf/step_time", "perf/train_time",
        "perf/update_weights_time", "perf/actor_train_time", "perf/actor_train_tok_per_s", "perf/train_wait_time",
        "perf/actor_train_tflops",
        "perf/wait_time_ratio",
    },
    "train/step": {
        "train/loss", "train/pg_loss", "train/pg_clipfrac", "train/ppo_kl", "train/entropy_loss", "train/grad_norm",
        "train/lr-pg_0", "train/train_rollout_logprob_abs_diff",
    },
    "eval/step": {"eval/held", "eval/held-truncated_ratio", "eval/held/response_len/mean"},
}  # fmt: skip


def test_a_colocated_run_trains_evaluates_saves_and_leaves_nothing_behind(start: Starter) -> None:
    save = start.folder / "ckpt"
    held_out = f"{start.prompts}@[:4]"
    run = start(
        *("--save", str(save), "--save-hf", str(save / "hf_{rollout_id}"), "--check-weight-update-equal"),
        *("--eval-interval", "1", "--eval-prompt-data", "held", held_out),
    ).succeeds()

    for axis, names in DOCUMENTED_METRICS.items():
        for metrics in run.metrics(axis):
            assert names <= metrics.keys(), names - metrics.keys()
    assert [len(run.metrics(axis)) for axis in DOCUMENTED_METRICS] == [2, 2, 3]
    assert all(m["train/train_rollout_logprob_abs_diff"] < 1e-4 for m in run.metrics("train/step"))
    for rollout_id in range(2):
        samples = run.samples(rollout_id)
        assert [sample["index"] for sample in samples] == list(range(8 * rollout_id, 8 * rollout_id + 8))
        assert {version for sample in samples for version in sample["weight_versions"]} == {str(rollout_id)}

    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1"
    trained = AutoModelForCausalLM.from_pretrained(save / "hf_1")
    tokenizer = AutoTokenizer.from_pretrained(save / "hf_1")
    answer = trained.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 4
    before = load_file(start.model / "model.safetensors")
    after = {name: tensor for path in (save / "hf_1").glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    run.leaves_nothing(within_s=5)
