from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plain_grpo
from helpers.training import (
    full_weights,
    make_backend,
    make_recipe,
    random_batch,
    random_samples,
    settings_for,
)

from slime.data.batch import batch_from_samples

# adam_eps keeps tiny gradients from being blown up to full steps, where float32 and float64 would part.
STEADY = {"adam_eps": 1e-4, "lr": 1e-3}


def run_ours(
    model: Path, dump_dir: Path, batch: Any, **settings: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    args = settings_for(model, **STEADY | settings)
    backend = make_backend(args)
    backend.load()
    metrics = make_recipe(backend, args, dump_dir).train(0, batch)
    return metrics, full_weights(backend)


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor.double(), theirs[name].double(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "per_token": {"calculate_per_token_loss": True},
    "kl_loss": {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "low_var_kl"},
    "k3_kl_loss": {"use_kl_loss": True, "kl_loss_coef": 0.01, "kl_loss_type": "k3"},
    "k2_kl_loss": {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k2"},
    "kl_reward_shaping": {"kl_coef": 0.2, "kl_loss_type": "k1"},
    "entropy_bonus": {"entropy_coef": 0.05},
    "no_std": {"grpo_std_normalization": False},
    "raw_rewards": {"rewards_normalization": False, "calculate_per_token_loss": True},
    "temperature": {"rollout_temperature": 0.7},
    "two_steps": {"num_steps_per_rollout": 2, "lr": 1e-2},
    "four_steps_with_everything": {
        "num_steps_per_rollout": 4,
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "entropy_coef": 0.01,
        "weight_decay": 0.1,
        "clip_grad": 0.05,
    },
    "rollout_log_probs": {"use_rollout_logprobs": True, "eps_clip": 0.4, "eps_clip_high": 0.6},
    "sft": {"loss_type": "sft_loss"},
    "sft_per_token_two_steps": {
        "loss_type": "sft_loss",
        "calculate_per_token_loss": True,
        "num_steps_per_rollout": 2,
        "rollout_temperature": 0.9,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_training_on_a_rollout_equals_a_plain_implementation(
    case: str, model: Path, other_model: Path, tmp_path: Path
) -> None:
    settings = {"ref_load": str(other_model)} if "kl" in case or case == "four_steps_with_everything" else {}
    settings |= {"load": str(model)} | CASES[case]
    samples = random_samples(seed=3)
    batch = batch_from_samples(samples, [float(sample.reward) for sample in samples])  # type: ignore[arg-type]
    metrics, weights = run_ours(model, tmp_path, batch, **settings)
    args = settings_for(model, **STEADY | settings)
    theirs = plain_grpo.train(model, samples, args, reference=settings.get("ref_load"))
    assert metrics["train/loss"] == pytest.approx(np.mean(theirs.losses), abs=2e-5)
    assert metrics["train/grad_norm"] == pytest.approx(np.mean(theirs.grad_norms), rel=1e-4)
    for name, weight in weights.items():
        first, last = theirs.first_weights[name], theirs.weights[name]
        assert (weight - last).norm() < 1e-3 * (last - first).norm(), name


SPLITS: dict[str, dict[str, Any]] = {
    "one_pack": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 10_000},
    "small_packs": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 30},
    "three_at_a_time": {"micro_batch_size": 3},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "sdpa_of_transformers": {"attn_implementation": "sdpa", "micro_batch_size": 4},
    "large_chunks": {"log_probs_chunk_size": 1024},
    "unbalanced": {"balance_data": False, "micro_batch_size": 2},
}


@pytest.mark.parametrize("split", SPLITS)
def test_how_samples_are_packed_changes_nothing(split: str, model: Path, tmp_path: Path) -> None:
    batch = random_batch(group_sizes=(3, 1, 4))
    reference, weights = run_ours(model, tmp_path, batch)
    metrics, other_weights = run_ours(model, tmp_path, batch, **SPLITS[split])
    assert metrics == pytest.approx(reference, abs=2e-6, rel=1e-5)
    assert_same_weights(weights, other_weights)


def test_the_order_of_samples_changes_nothing(model: Path, tmp_path: Path) -> None:
    batch = random_batch(group_sizes=(3, 1, 4))
    shuffled = batch.select(np.random.default_rng(0).permutation(len(batch)))
    reference, weights = run_ours(model, tmp_path, batch, micro_batch_size=4)
    metrics, other_weights = run_ours(model, tmp_path, shuffled, micro_batch_size=4)
    assert metrics == pytest.approx(reference, abs=2e-6, rel=1e-5)
    assert_same_weights(weights, other_weights)


def test_two_equal_runs_are_equal_bit_for_bit(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_steps_per_rollout": 2, "micro_batch_size": 2}
    first, weights = run_ours(model, tmp_path, random_batch(), **settings)
    second, other_weights = run_ours(model, tmp_path, random_batch(), **settings)
    assert first == second
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


def test_at_the_first_step_the_ratio_is_one(model: Path, tmp_path: Path) -> None:
    metrics, _ = run_ours(model, tmp_path, random_batch())
    assert metrics["train/ppo_kl"] == 0.0
    assert metrics["train/pg_clipfrac"] == 0.0


def test_old_log_probs_stay_those_before_the_first_of_several_steps(model: Path, tmp_path: Path) -> None:
    metrics, _ = run_ours(model, tmp_path, random_batch(), num_steps_per_rollout=4, lr=3e-2, eps_clip=0.01)
    assert metrics["train/ppo_kl"] != 0.0
    assert metrics["train/pg_clipfrac"] > 0.0


def test_kl_shapes_rewards_before_they_are_normalised(model: Path, other_model: Path, tmp_path: Path) -> None:
    samples = random_samples()
    for sample in samples:
        sample.reward = 1.0
    batch = batch_from_samples(samples, [1.0] * len(samples))
    settings = {"kl_coef": 0.5, "ref_load": str(other_model), "load": str(model)}
    metrics, _ = run_ours(model, tmp_path, batch, **settings)
    assert metrics["train/grad_norm"] > 0.01  # equal rewards, unequal KL: there is something to learn
    no_shaping, _ = run_ours(model, tmp_path, batch)
    assert no_shaping["train/grad_norm"] == 0.0


def test_rewards_that_a_plugin_normalised_are_the_advantages(model: Path, tmp_path: Path) -> None:
    samples = random_samples()
    rewards = [0.5, -1.0, 0.25, 3.0, 0.0, 0.0, -2.0, 1.0]
    batch = batch_from_samples(samples, rewards, rewards_are_final=True)
    metrics, _ = run_ours(model, tmp_path, batch)
    assert metrics["rollout/advantages"] == pytest.approx(np.mean(rewards))
    assert metrics["train/pg_loss"] == pytest.approx(-np.mean(rewards), rel=1e-5)


def test_a_fully_masked_sample_counts_in_the_mean_and_adds_nothing(model: Path, tmp_path: Path) -> None:
    samples = random_samples()
    samples[0].remove_sample = True
    rewards = [float(sample.reward) for sample in samples]  # type: ignore[arg-type]
    metrics, _ = run_ours(model, tmp_path, batch_from_samples(samples, rewards), rewards_normalization=False)
    assert metrics["train/pg_loss"] == pytest.approx(-sum(rewards[1:]) / 8, rel=1e-5)


def test_use_rollout_logprobs_without_any_names_the_flag(model: Path, tmp_path: Path) -> None:
    samples = random_samples()
    samples[2].rollout_log_probs = None
    batch = batch_from_samples(samples, [1.0, 0.0] * 4)
    with pytest.raises(ValueError, match=r"--use-rollout-logprobs: .* without rollout_log_probs"):
        run_ours(model, tmp_path, batch, use_rollout_logprobs=True)
