from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.shaping import token_rewards

MASKS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=6)


@given(masks=MASKS, kl_coef=st.sampled_from([0.0, 0.1, 2.0]))
def test_rewards_equal_a_loop_over_tokens(masks: list[list[int]], kl_coef: float) -> None:
    scores = [10.0 + index for index in range(len(masks))]
    kl, expected = [], []
    for score, mask in zip(scores, masks, strict=True):
        last = max((t for t, m in enumerate(mask) if m), default=None)
        for t, is_trained in enumerate(mask):
            kl.append(0.5 + len(kl) if is_trained else math.nan)
            expected.append((-kl_coef * kl[-1] if is_trained else 0.0) + (score if t == last else 0.0))
    result = token_rewards(
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(kl, dtype=torch.float64),
        mask_T=torch.tensor([float(m) for mask in masks for m in mask]),
        sequence_ids_T=torch.tensor([index for index, mask in enumerate(masks) for _ in mask]),
        kl_coef=kl_coef,
    )
    assert result.tolist() == pytest.approx(expected)


def test_the_score_of_a_fully_masked_sequence_goes_nowhere() -> None:
    result = token_rewards(
        torch.tensor([7.0, 3.0]),
        torch.zeros(3),
        mask_T=torch.tensor([0.0, 0, 1]),
        sequence_ids_T=torch.tensor([0, 0, 1]),
        kl_coef=1.0,
    )
    assert result.tolist() == [0, 0, 3]
