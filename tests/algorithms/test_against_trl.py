"""Our losses beside TRL's own code, on the same random tensors and without a model: values and gradients, float32.

TRL pads [B, L]; we pack [T]. Where the two define a thing differently, a test says how.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.algorithms import dr_grpo, grpo, rloo
from slime.algorithms.cispo import cispo_loss
from slime.algorithms.gspo import sequence_log_ratio
from slime.algorithms.kl import kl_estimate, unbiased_kl
from slime.algorithms.opsm import keep_mask
from slime.algorithms.ppo import clipped_surrogate
from slime.algorithms.reduce import constant_weights, per_sample_weights, per_token_weights
from slime.algorithms.sequences import Sequences

pytest.importorskip("trl", minversion="1.0")
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

NUM_SEQUENCES, LONGEST, EPS_LOW, EPS_HIGH = 6, 9, 0.2, 0.3
LENGTHS = torch.tensor([9, 1, 4, 7, 2, 9])
MASK_BL = (torch.arange(LONGEST) < LENGTHS[:, None]).float()
MASK_BL[3, 2:4] = 0  # a tool's output
PRESENT = (torch.arange(LONGEST) < LENGTHS[:, None]).flatten()
IDS_T = torch.arange(NUM_SEQUENCES).repeat_interleave(LENGTHS)
SAMPLE_WEIGHTS_T = per_sample_weights(MASK_BL.flatten()[PRESENT], IDS_T, NUM_SEQUENCES)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def sequence_sum(x_T: Tensor) -> Tensor:
    return torch.zeros(NUM_SEQUENCES, dtype=x_T.dtype).index_add(0, IDS_T, x_T)


def packed(values_BL: Tensor) -> Tensor:
    """[B, L], or [B] for all tokens of a sequence, as [T]."""
    return values_BL[IDS_T] if values_BL.dim() == 1 else values_BL.flatten()[PRESENT]


MASK_T = packed(MASK_BL)
SEQUENCES = Sequences(MASK_T, IDS_T, sequence_sum)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    log_probs_BL = -torch.rand(NUM_SEQUENCES, LONGEST, generator=random) * 4
    drift = torch.randn(2, NUM_SEQUENCES, LONGEST, generator=random) * torch.tensor([0.4, 0.8])[:, None, None]
    return {
        "log_probs": log_probs_BL.requires_grad_(),
        "old": (log_probs_BL + drift[0]).detach(),
        "ref": (log_probs_BL + drift[1]).detach(),
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.3, 0.9, -0.2]),
    }


def trainer_of(kind: type[Any], log_probs_BL: Tensor, **attributes: Any) -> Any:
    """A trainer without its constructor: `_compute_loss` reads attributes and asks for log-probs, which are given."""
    trainer = kind.__new__(kind)
    options = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    given = {name: attributes.pop(name) for name in options.keys() & attributes.keys()}
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    defaults = {
        "args": SimpleNamespace(**options | given),
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "current_gradient_accumulation_steps": 1,
        "epsilon_low": EPS_LOW,
        "epsilon_high": EPS_HIGH,
        "importance_sampling_level": "token",
        "max_completion_length": 12,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
    }
    for name, value in (defaults | attributes).items():
        setattr(trainer, name, value)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs_BL, torch.zeros_like(log_probs_BL), None)
    return trainer


def trl_loss(
    inputs: dict[str, Tensor], loss_type: str, *, mask: Tensor = MASK_BL, **attributes: Any
) -> tuple[Tensor, Tensor]:
    """TRL's loss, and its gradient as [T]."""
    no_prompt = torch.zeros(NUM_SEQUENCES, 0, dtype=torch.int64)
    trainer = trainer_of(GRPOTrainer, inputs["log_probs"], loss_type=loss_type, **attributes)
    batch = {
        "prompt_ids": no_prompt,
        "prompt_mask": no_prompt,
        "completion_ids": torch.zeros(NUM_SEQUENCES, LONGEST, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": inputs["advantages"],
        "old_per_token_logps": inputs["old"],
        "ref_per_token_logps": inputs["ref"],
        "num_items_in_batch": MASK_BL.sum(),
    }
    return with_gradient(trainer._compute_loss(None, batch), inputs)


def with_gradient(loss: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    (gradient_BL,) = torch.autograd.grad(loss, inputs["log_probs"])
    return loss.detach(), packed(gradient_BL)


def our_loss(weights_T: Tensor, loss_T: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return with_gradient((weights_T * loss_T).sum(), inputs)


def surrogate(inputs: dict[str, Tensor], *, eps_clip_c: float | None = None) -> Tensor:
    log_ratio_T = packed(inputs["log_probs"] - inputs["old"])
    advantages_T = packed(inputs["advantages"])
    return clipped_surrogate(
        log_ratio_T, advantages_T, eps_low=EPS_LOW, eps_high=EPS_HIGH, eps_clip_c=eps_clip_c
    ).loss_T


@pytest.mark.parametrize(
    ("loss_type", "weights_T"),
    [
        ("grpo", SAMPLE_WEIGHTS_T),
        ("bnpo", per_token_weights(MASK_T)),
        ("dapo", per_token_weights(MASK_T)),
        ("dr_grpo", constant_weights(MASK_T, NUM_SEQUENCES, max_length=12)),
    ],
)
def test_each_loss_type_is_the_clipped_surrogate_with_another_mean(
    loss_type: str, weights_T: Tensor, inputs: dict[str, Tensor]
) -> None:
    torch.testing.assert_close(our_loss(weights_T, surrogate(inputs), inputs), trl_loss(inputs, loss_type), **CLOSE)


def test_over_micro_batches_bnpo_averages_means_where_ours_is_the_mean_over_the_steps_tokens(
    inputs: dict[str, Tensor],
) -> None:
    """Of two micro-batches TRL masks either half here, so each call divides by its own tokens; dapo by all of them."""
    halves = [
        MASK_BL * (torch.arange(NUM_SEQUENCES) < 3)[:, None],
        MASK_BL * (torch.arange(NUM_SEQUENCES) >= 3)[:, None],
    ]
    ours = our_loss(per_token_weights(MASK_T), surrogate(inputs), inputs)[0]
    dapo = sum(trl_loss(inputs, "dapo", mask=half)[0] for half in halves)
    bnpo = sum(trl_loss(inputs, "bnpo", mask=half, current_gradient_accumulation_steps=2)[0] for half in halves)
    torch.testing.assert_close(ours, dapo, **CLOSE)
    assert not torch.allclose(ours, bnpo, rtol=1e-2)


def test_cispo_equals_trls_which_bounds_only_above_and_writes_the_bound_itself(inputs: dict[str, Tensor]) -> None:
    """TRL's epsilon_high is the largest ratio; ours, as PPO's, its distance from 1."""
    loss = cispo_loss(
        packed(inputs["log_probs"]),
        packed(inputs["old"]),
        advantages_T=packed(inputs["advantages"]),
        eps_low=1.0,
        eps_high=0.25,
    )
    expected = trl_loss(inputs, "cispo", epsilon_high=1.25)
    torch.testing.assert_close(our_loss(per_token_weights(MASK_T), loss.loss_T, inputs), expected, **CLOSE)


def test_gspo_is_trls_sequence_level_ratio(inputs: dict[str, Tensor]) -> None:
    log_ratio_T = sequence_log_ratio(packed(inputs["log_probs"]), packed(inputs["old"]), sequences=SEQUENCES)
    loss = clipped_surrogate(log_ratio_T, packed(inputs["advantages"]), eps_low=EPS_LOW, eps_high=EPS_HIGH)
    expected = trl_loss(inputs, "grpo", importance_sampling_level="sequence")
    torch.testing.assert_close(our_loss(SAMPLE_WEIGHTS_T, loss.loss_T, inputs), expected, **CLOSE)


def test_dual_clip_is_trls_two_sided_clipping(inputs: dict[str, Tensor]) -> None:
    """TRL bounds the ratio by delta and we the loss by c times the advantage: the same above 1 + eps."""
    ours = our_loss(SAMPLE_WEIGHTS_T, surrogate(inputs, eps_clip_c=1.4), inputs)
    assert not torch.equal(ours[0], our_loss(SAMPLE_WEIGHTS_T, surrogate(inputs), inputs)[0])
    torch.testing.assert_close(ours, trl_loss(inputs, "grpo", delta=1.4), **CLOSE)


@pytest.mark.parametrize("is_unbiased", [False, True])
def test_the_kl_term_is_k3_optionally_weighted(is_unbiased: bool, inputs: dict[str, Tensor]) -> None:
    log_probs_T = packed(inputs["log_probs"])
    kl_T = kl_estimate(log_probs_T, packed(inputs["ref"]), "k3")
    if is_unbiased:
        kl_T = unbiased_kl(kl_T, log_probs_T, old_log_probs_T=packed(inputs["old"]))
    expected = trl_loss(inputs, "grpo", beta=0.1, use_bias_correction_kl=is_unbiased)
    torch.testing.assert_close(our_loss(SAMPLE_WEIGHTS_T, surrogate(inputs) + 0.1 * kl_T, inputs), expected, **CLOSE)


def test_off_policy_sequence_masking_drops_what_trl_drops(inputs: dict[str, Tensor]) -> None:
    keep_T = keep_mask(
        packed(inputs["log_probs"]),
        packed(inputs["old"]),
        advantages_T=packed(inputs["advantages"]),
        sequences=SEQUENCES,
        delta=0.05,
    )
    trained_T = keep_T[MASK_T != 0]
    assert 0 < trained_T.sum() < len(trained_T)
    expected = trl_loss(inputs, "grpo", off_policy_mask_threshold=0.05)
    torch.testing.assert_close(our_loss(SAMPLE_WEIGHTS_T, keep_T * surrogate(inputs), inputs), expected, **CLOSE)


def rloo_loss(inputs: dict[str, Tensor], old_BL: Tensor) -> tuple[Tensor, Tensor]:
    no_prompt = torch.zeros(NUM_SEQUENCES, 0, dtype=torch.int64)
    trainer = trainer_of(RLOOTrainer, inputs["log_probs"])
    batch = {
        "prompt_ids": no_prompt,
        "prompt_mask": no_prompt,
        "completion_ids": torch.zeros(NUM_SEQUENCES, LONGEST, dtype=torch.int64),
        "completion_mask": MASK_BL,
        "advantages": inputs["advantages"],
        "old_logps": (old_BL * MASK_BL).sum(1),
    }
    return with_gradient(trainer._compute_loss(None, batch), inputs)


def test_at_the_old_policy_rloo_is_the_sum_over_tokens_and_mean_over_samples(inputs: dict[str, Tensor]) -> None:
    inputs["old"] = inputs["log_probs"].detach()
    weights_T = constant_weights(MASK_T, NUM_SEQUENCES, max_length=1)
    _, gradient_T = our_loss(weights_T, surrogate(inputs), inputs)
    torch.testing.assert_close(gradient_T, rloo_loss(inputs, inputs["old"])[1], **CLOSE)


def test_away_from_it_trls_rloo_clips_the_ratio_of_the_whole_response_and_we_that_of_a_token(
    inputs: dict[str, Tensor],
) -> None:
    """They agree for responses of one token; the product of many ratios leaves any clip range."""
    weights_T = constant_weights(MASK_T, NUM_SEQUENCES, max_length=1)
    _, ours_T = our_loss(weights_T, surrogate(inputs), inputs)
    _, theirs_T = rloo_loss(inputs, inputs["old"])
    is_single_T = packed(LENGTHS) == 1
    torch.testing.assert_close(ours_T[is_single_T], theirs_T[is_single_T], **CLOSE)
    assert not torch.allclose(ours_T, theirs_T)


def test_advantages_are_those_of_trl_up_to_the_epsilon_of_the_std() -> None:
    """TRL computes them amid generation, so its formulas are written out: epsilon 1e-4 where ours is 1e-6.

    It takes groups by reshape; ours go by id.
    """
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, -1.0, 0.5, 0.0], [3.0, 3.0, 3.0, 3.0]])
    rewards_S, ids_S = rewards_PG.flatten(), torch.arange(3).repeat_interleave(4)
    centered_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    leave_one_out_PG = rewards_PG - (rewards_PG.sum(1, keepdim=True) - rewards_PG) / 3
    torch.testing.assert_close(dr_grpo.advantages(rewards_S, ids_S), centered_PG.flatten(), **CLOSE)
    torch.testing.assert_close(rloo.advantages(rewards_S, ids_S), leave_one_out_PG.flatten(), **CLOSE)
    standardized_PG = centered_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)
    ours = grpo.advantages(rewards_S, ids_S, std_normalize=True)
    torch.testing.assert_close(ours, standardized_PG.flatten(), rtol=2e-4, atol=0)
    assert not torch.allclose(ours, standardized_PG.flatten(), rtol=1e-6, atol=0)
