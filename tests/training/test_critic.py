from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import random_batch, run_ranks, settings_for

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.config.run import critic_settings
from slime.data.batch import TrainBatch
from slime.training.critic import CriticRecipe, CriticUpdate

SETTINGS: dict[str, Any] = {
    "advantage_estimator": "ppo",
    "critic_lr": 1e-3,
    "adam_eps": 1e-4,
    "gamma": 0.9,
    "lambd": 0.7,
}


def make_critic(model: Path, **settings: Any) -> CriticRecipe:
    args = settings_for(model, **SETTINGS | settings)
    run = critic_settings(args)
    backend = FSDPBackend(run, args, torch.device("cpu"), role="critic")
    backend.load()
    return CriticRecipe(backend, args, run, phase=lambda name: contextlib.nullcontext())


def returns_of(batch: TrainBatch, values: np.ndarray, kl: np.ndarray, args: Any) -> np.ndarray:
    """GAE returns by a loop over tokens from the last to the first; 0 at masked ones."""
    result, end = np.zeros(len(values)), 0
    for length, reward in zip(batch.response_lengths, batch.rewards, strict=True):
        start, end = end, end + length
        trained = [t for t in range(start, end) if batch.loss_mask[t]]
        advantage = next_value = 0.0
        for t in reversed(trained):
            token_reward = -args.kl_coef * kl[t] + (reward if t == trained[-1] else 0.0)
            delta = token_reward + args.gamma * next_value - values[t]
            advantage = delta + args.gamma * args.lambd * advantage
            result[t], next_value = advantage + values[t], values[t]
    return result


def test_values_come_in_the_order_of_the_batch_and_the_loss_is_that_of_a_loop(model: Path) -> None:
    batch = random_batch(group_sizes=(3, 1, 4))
    kl = np.random.default_rng(0).normal(size=len(batch.loss_mask)).astype(np.float32)
    critic = make_critic(
        model, kl_coef=0.1, num_steps_per_rollout=1, micro_batch_size=3, use_opd=True, normalize_advantages=True
    )
    shaped = dataclasses.replace(batch, kl=kl)
    critic.train(0, shaped)  # the value head begins at 0
    update = critic.train(1, shaped)
    assert np.abs(update.values).max() > 1e-4
    returns = returns_of(batch, update.values, kl, critic.algorithm)
    means, end = [], 0
    for length in batch.response_lengths:
        start, end = end, end + length
        mask = batch.loss_mask[start:end]
        error = (update.values[start:end] - returns[start:end]) ** 2
        means.append((error * mask).sum() / max(1, mask.sum()))
    assert update.metrics["train/value_loss"] == pytest.approx(np.mean(means), rel=1e-4)
    trained = batch.loss_mask > 0
    explained = 1 - np.var((returns - update.values)[trained]) / np.var(returns[trained])
    assert update.metrics["train/explained_variance"] == pytest.approx(explained, rel=1e-3)


def test_a_critic_learns_to_foresee_the_reward(model: Path) -> None:
    batch = random_batch(group_sizes=(3, 1, 4))
    critic = make_critic(model, gamma=1.0, lambd=1.0, critic_lr=1e-2, value_clip=10.0)
    updates = [critic.train(step, batch) for step in range(25)]
    assert updates[-1].metrics["train/value_loss"] < 0.1 * updates[0].metrics["train/value_loss"]
    assert updates[0].metrics["train/explained_variance"] < 0.1
    assert updates[-1].metrics["train/explained_variance"] > 0.8


def body(model: Path, out: Path) -> None:
    update = two_updates(model)
    torch.save((update.metrics, torch.from_numpy(update.values)), out / f"{torch.distributed.get_rank()}.pt")


def two_updates(model: Path) -> CriticUpdate:
    critic = make_critic(model, num_steps_per_rollout=2)
    critic.train(0, random_batch(group_sizes=(3, 1, 4)))
    return critic.train(1, random_batch(group_sizes=(3, 1, 4), seed=1))


def test_two_ranks_train_as_one_and_both_know_all_values(model: Path, tmp_path: Path) -> None:
    run_ranks(body, 2, model, tmp_path, store=tmp_path / "store")
    alone = two_updates(model)
    for rank in range(2):
        metrics, values = torch.load(tmp_path / f"{rank}.pt")
        assert metrics == pytest.approx(alone.metrics, abs=1e-5, rel=1e-4)
        torch.testing.assert_close(values, torch.from_numpy(alone.values), rtol=0, atol=2e-6)
