from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms import reinforce_plus_plus
from slime.algorithms.shaping import token_rewards

# (reward, trained) of each token of each sequence
SEQUENCES = st.lists(
    st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=7), min_size=1, max_size=5
)


def tensors(sequences: list[list[tuple[float, bool]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rewards = [reward if trained else math.nan for sequence in sequences for reward, trained in sequence]
    mask = [float(trained) for sequence in sequences for _, trained in sequence]
    ids = [index for index, sequence in enumerate(sequences) for _ in sequence]
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(mask), torch.tensor(ids)


@given(sequences=SEQUENCES, gamma=st.sampled_from([1.0, 0.9, 0.0]))
def test_returns_equal_the_sum_over_later_trained_tokens(
    sequences: list[list[tuple[float, bool]]], gamma: float
) -> None:
    expected = []
    for sequence in sequences:
        for t, (_, is_trained) in enumerate(sequence):
            later = [reward for reward, trained in sequence[t:] if trained]
            expected.append(sum(gamma**k * reward for k, reward in enumerate(later)) if is_trained else 0.0)
    rewards_T, mask_T, ids_T = tensors(sequences)
    result = reinforce_plus_plus.returns(rewards_T, mask_T, sequence_ids_T=ids_T, gamma=gamma)
    assert result.tolist() == pytest.approx(expected, abs=1e-9)


def test_without_kl_and_discount_every_trained_token_returns_the_score() -> None:
    mask_T, ids_T = torch.tensor([1.0, 1, 0, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    scores_S, kl_T = torch.tensor([2.0, -1.0, 5.0]), torch.full((6,), math.nan)
    kl_T[mask_T != 0] = 3.0
    rewards_T = token_rewards(scores_S, kl_T, mask_T=mask_T, sequence_ids_T=ids_T, kl_coef=0.0)
    result = reinforce_plus_plus.returns(rewards_T, mask_T, sequence_ids_T=ids_T, gamma=1.0)
    assert result.tolist() == [2, 2, 0, -1, 0, 0]


def test_appended_masked_tokens_change_no_return() -> None:
    rewards_T, mask_T = torch.tensor([0.1, 0.2, 1.0]), torch.ones(3)
    plain = reinforce_plus_plus.returns(rewards_T, mask_T, sequence_ids_T=torch.zeros(3, dtype=torch.int64), gamma=0.9)
    padded = reinforce_plus_plus.returns(
        torch.cat([rewards_T, torch.full((4,), math.inf)]),
        torch.cat([mask_T, torch.zeros(4)]),
        sequence_ids_T=torch.zeros(7, dtype=torch.int64),
        gamma=0.9,
    )
    assert padded.tolist() == plain.tolist() + [0.0] * 4


def test_the_baseline_form_is_the_centered_score_minus_each_tokens_own_kl() -> None:
    result = reinforce_plus_plus.baseline_advantages(
        torch.tensor([1.0, -1.0]),
        torch.tensor([0.5, math.nan, 2.0, 0.0]),
        mask_T=torch.tensor([1.0, 0, 1, 1]),
        sequence_ids_T=torch.tensor([0, 0, 0, 1]),
        kl_coef=0.1,
    )
    assert result.tolist() == pytest.approx([0.95, 0.0, 0.8, -1.0])
