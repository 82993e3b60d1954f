from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slime.config import AlgorithmConfig
from slime.data.packed import PackedBatch
from slime.training.backend import TokenOutputs
from slime.training.loss import loss_for

MASK = [1.0, 0.0, 1.0, 1.0, 0.0]
BAD = [float("nan"), float("inf"), float("-inf"), 1000.0, -1000.0]


def make_batch(**fields: Tensor | None) -> PackedBatch:
    """Five response tokens of two sequences, two of them masked."""
    mask = torch.tensor(MASK)
    defaults: dict[str, Any] = {
        "advantages": torch.tensor([1.0, 1.0, -0.5, -0.5, -0.5]),
        "old_log_probs": torch.tensor([-1.0, -2.0, -1.5, -0.5, -3.0]),
        "ref_log_probs": torch.tensor([-1.2, -2.2, -1.0, -0.7, -2.0]),
        "rollout_log_probs": torch.tensor([-1.1, 0.0, -1.4, -0.6, 0.0]),
    }
    return PackedBatch(
        input_ids=torch.arange(8),
        position_ids=torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]),
        sequence_lengths=[3, 5],
        target_index=torch.tensor([1, 2, 5, 6, 7]),
        sequence_ids=torch.tensor([0, 0, 1, 1, 1]),
        loss_weights=mask / 3,
        loss_mask=mask,
        rows=[0, 1],
        **defaults | fields,
    )


def run(batch: PackedBatch, log_probs: Tensor, entropy: Tensor | None = None, **settings: Any) -> tuple[Tensor, dict]:
    """Gradient with respect to the log-probs, and the metrics."""
    cfg = AlgorithmConfig(**{"eps_clip_high": 0.2, "use_kl_loss": True, "kl_loss_coef": 0.1} | settings)
    leaf = log_probs.clone().requires_grad_()
    result = loss_for(cfg)(TokenOutputs(leaf, entropy), batch, lambda values: values)
    result.loss.backward()
    assert leaf.grad is not None
    metrics = {name: float(value) for name, value in result.metrics.items()}
    return leaf.grad, metrics | {"loss": float(result.loss)}


LOG_PROBS = torch.tensor([-1.05, -1.9, -1.6, -0.4, -3.1])
LOSSES: list[dict[str, Any]] = [
    {"loss_type": "sft_loss"},
    *[{"kl_loss_type": kind, "entropy_coef": 0.1} for kind in ("k1", "k2", "k3", "low_var_kl")],
]


@pytest.mark.parametrize("settings", LOSSES, ids=str)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "where", ["log_probs", "entropy", "old_log_probs", "ref_log_probs", "rollout_log_probs", "advantages"]
)
def test_what_stands_at_masked_tokens_reaches_neither_loss_nor_gradient(
    where: str, bad: float, settings: dict[str, Any]
) -> None:
    entropy = torch.tensor([1.0, 2.0, 1.5, 1.0, 0.5])
    expected_gradient, expected = run(make_batch(), LOG_PROBS, entropy, **settings)
    values = {**vars(make_batch()), "log_probs": LOG_PROBS, "entropy": entropy}[where].clone()
    values[torch.tensor(MASK) == 0] = bad
    batch = make_batch(**({where: values} if where in vars(make_batch()) else {}))
    gradient, metrics = run(
        batch,
        values if where == "log_probs" else LOG_PROBS,
        values if where == "entropy" else entropy,
        **settings,
    )
    assert torch.equal(gradient, expected_gradient)
    assert metrics == expected
    assert gradient[torch.tensor(MASK) == 0].tolist() == [0.0, 0.0]


def test_policy_loss_is_the_sum_of_its_terms() -> None:
    entropy = torch.tensor([1.0, 2.0, 1.5, 1.0, 0.5])
    _, metrics = run(make_batch(), LOG_PROBS, entropy, kl_loss_type="k1", entropy_coef=0.3)
    trained = torch.tensor(MASK).bool()
    ratio = torch.exp(LOG_PROBS - make_batch().old_log_probs)[trained]
    advantages = make_batch().advantages[trained]
    pg = -torch.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages).mean()
    kl = (LOG_PROBS - make_batch().ref_log_probs)[trained].mean()
    assert metrics["pg_loss"] == pytest.approx(float(pg))
    assert metrics["kl_loss"] == pytest.approx(float(kl))
    assert metrics["entropy_loss"] == pytest.approx(float(entropy[trained].mean()))
    assert metrics["loss"] == pytest.approx(float(pg + 0.1 * kl - 0.3 * entropy[trained].mean()))
    assert metrics["ppo_kl"] == pytest.approx(float((make_batch().old_log_probs - LOG_PROBS)[trained].mean()))
    gap = (make_batch().old_log_probs - make_batch().rollout_log_probs)[trained].abs().mean()
    assert metrics["train_rollout_logprob_abs_diff"] == pytest.approx(float(gap))


def test_clip_fraction_counts_trained_tokens_whose_clipped_branch_won() -> None:
    log_probs = make_batch().old_log_probs + torch.tensor([0.5, 9.0, 0.5, -0.5, 9.0])
    _, metrics = run(make_batch(), log_probs)
    assert metrics["pg_clipfrac"] == pytest.approx(2 / 3)  # the first (A > 0, up) and the fourth (A < 0, down)


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_is_that_of_the_policy() -> None:
    batch = make_batch(old_log_probs=None, ref_log_probs=None)
    gradient, metrics = run(batch, LOG_PROBS)
    assert metrics["ppo_kl"] == 0.0
    torch.testing.assert_close(gradient, -batch.advantages * batch.loss_weights)


def test_micro_batches_add_up_to_the_whole() -> None:
    """The same tokens as two halves, each with the weights of the whole step."""
    whole, metrics = run(make_batch(), LOG_PROBS)
    halves = []
    for kept in ([1, 1, 0, 0, 0], [0, 0, 1, 1, 1]):
        batch = make_batch()
        batch.loss_weights = batch.loss_weights * torch.tensor(kept)
        halves.append(run(batch, LOG_PROBS))
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole)
    for name in metrics:
        assert halves[0][1][name] + halves[1][1][name] == pytest.approx(metrics[name], abs=1e-6)


def test_metrics_carry_no_graph() -> None:
    cfg = AlgorithmConfig(eps_clip_high=0.2)
    result = loss_for(cfg)(TokenOutputs(LOG_PROBS.clone().requires_grad_()), make_batch(), lambda values: values)
    assert not any(value.requires_grad for value in result.metrics.values())
