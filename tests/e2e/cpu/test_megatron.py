"""The whole control path with Megatron in the trainers, on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.e2e.cpu.helpers.runs import Starter
from tests.helpers.model_families import write_tiny_model_with_mtp
from tests.helpers.tiny_models import make_tokenizer

MEGATRON = (
    *("--train-backend", "megatron", "--custom-megatron-init-path", "megatron_here.init"),
    *("--custom-megatron-before-log-prob-hook-path", "megatron_here.before_log_prob"),
    *("--custom-megatron-before-train-step-hook-path", "megatron_here.before_train_step"),
    *("--use-kl-loss", "--kl-loss-coef", "0.01", "--num-steps-per-rollout", "2"),
)


@pytest.mark.slow
def test_megatron_samples_trains_saves_and_goes_on(start: Starter) -> None:
    save = start.folder / "ckpt"
    flags = (
        *MEGATRON,
        "--save",
        str(save),
        "--save-hf",
        str(save / "hf_{rollout_id}"),
        "--check-weight-update-equal",
        "--async-save",
    )
    run = start(*flags).succeeds()
    assert "Megatron-core 0." in run.output()
    for metrics in run.metrics("train/step"):
        assert metrics["train/train_rollout_logprob_abs_diff"] < 1e-4  # the engine sampled with the trainer's weights
        assert metrics["train/grad_norm"] > 0
    hooks = [json.loads(line) for line in (run.run_dir / "hooks.jsonl").read_text().splitlines()]
    assert {"prefix": "ref_", "stages": 1} in hooks
    steps = [(note["rollout_id"], note["step_id"]) for note in hooks if "step_id" in note]
    assert steps == [(0, 0), (0, 1), (1, 0), (1, 1)]

    last = AutoModelForCausalLM.from_pretrained(save / "hf_1").state_dict()
    first = AutoModelForCausalLM.from_pretrained(start.model).state_dict()
    assert any(not torch.equal(tensor, first[name]) for name, tensor in last.items())
    goes_on = start(*flags, "--resume", "--num-rollout", "3").succeeds()
    assert "iter_0000001, 4 optimizer steps" in goes_on.output()
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    run.leaves_nothing()


@pytest.mark.slow
def test_two_ranks_share_the_matrices_and_serve_two_engines(start: Starter) -> None:
    run = start(
        *(*MEGATRON, "--actor-num-gpus-per-node", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"),
        "--check-weight-update-equal",
    ).succeeds()
    for metrics in run.metrics("train/step"):
        assert metrics["train/train_rollout_logprob_abs_diff"] < 1e-4
    run.leaves_nothing()


@pytest.mark.slow
def test_actor_and_critic_take_turns_with_megatron(start: Starter) -> None:
    flags = ("--train-backend", "megatron", "--custom-megatron-init-path", "megatron_here.init")
    run = start(*flags, "--advantage-estimator", "ppo", "--critic-lr", "1e-3", "--normalize-advantages").succeeds()
    losses = [metrics["train/value_loss"] for metrics in run.metrics("train/step")]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    run.leaves_nothing()


@pytest.mark.slow
def test_deepseek_v3_learns_and_its_engine_follows(start: Starter) -> None:
    """Latent attention in trainer and engine; layers for multi-token prediction stay what they were."""
    model = start.folder / "deepseek"
    mtp = write_tiny_model_with_mtp("deepseek_v3", model, vocab_size=320, initializer_range=0.2)
    make_tokenizer().save_pretrained(model)
    save = start.folder / "ckpt"
    run = start(
        *("--train-backend", "megatron", "--custom-megatron-init-path", "megatron_here.init"),
        *("--hf-checkpoint", str(model), "--check-weight-update-equal", "--rollout-max-response-len", "32"),
        *("--save", str(save), "--save-hf", str(save / "hf_{rollout_id}")),
    ).succeeds()
    gaps = [metrics["train/train_rollout_logprob_abs_diff"] for metrics in run.metrics("train/step")]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4
    before = load_file(model / "model.safetensors")
    after = load_file(save / "hf_1" / "model-00001.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("kv_a_proj" in name for name in changed)
    assert not mtp & changed
    run.leaves_nothing()
