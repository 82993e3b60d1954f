from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.reduce import constant_weights, per_rollout_weights, per_sample_weights, per_token_weights

MASKS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=6)


def flat(masks: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    mask_T = torch.tensor([value for mask in masks for value in mask], dtype=torch.float64)
    return mask_T, torch.tensor([index for index, mask in enumerate(masks) for _ in mask])


def values_like(mask_T: torch.Tensor) -> torch.Tensor:
    return torch.arange(1.0, len(mask_T) + 1, dtype=torch.float64) ** 2


@given(masks=MASKS)
def test_per_sample_weights_are_the_mean_over_samples_of_token_means(masks: list[list[int]]) -> None:
    mask_T, ids_T = flat(masks)
    values_T = values_like(mask_T)
    means, position = [], 0
    for mask in masks:
        kept = [float(values_T[position + i]) for i, value in enumerate(mask) if value]
        means.append(sum(kept) / len(kept) if kept else 0.0)
        position += len(mask)
    weighted = (per_sample_weights(mask_T, ids_T, len(masks)) * values_T).sum()
    assert weighted.item() == pytest.approx(sum(means) / len(means))


@given(masks=MASKS)
def test_per_token_weights_are_the_mean_over_trained_tokens(masks: list[list[int]]) -> None:
    mask_T, _ = flat(masks)
    values_T = values_like(mask_T)
    kept = values_T[mask_T.bool()]
    expected = float(kept.mean()) if len(kept) else 0.0
    assert (per_token_weights(mask_T) * values_T).sum().item() == pytest.approx(expected)


@given(masks=MASKS)
def test_weights_sum_to_one_less_the_share_of_fully_masked_samples(masks: list[list[int]]) -> None:
    mask_T, ids_T = flat(masks)
    num_trained = sum(any(mask) for mask in masks)
    assert per_sample_weights(mask_T, ids_T, len(masks)).sum().item() == pytest.approx(num_trained / len(masks))
    assert per_token_weights(mask_T).sum().item() == pytest.approx(1.0 if num_trained else 0.0)


@given(masks=MASKS)
def test_masked_tokens_weigh_exactly_nothing_and_trained_ones_something(masks: list[list[int]]) -> None:
    mask_T, ids_T = flat(masks)
    for weights_T in (per_token_weights(mask_T), per_sample_weights(mask_T, ids_T, len(masks))):
        assert torch.equal(weights_T != 0, mask_T != 0)


@given(masks=MASKS, rollouts=st.lists(st.integers(5, 8), min_size=6, max_size=6))
def test_per_rollout_weights_average_all_tokens_of_siblings_as_one_sample(
    masks: list[list[int]], rollouts: list[int]
) -> None:
    mask_T, ids_T = flat(masks)
    rollouts = rollouts[: len(masks)]
    values_T = values_like(mask_T)
    means = []
    for rollout in set(rollouts):
        places = [t for t, sample in enumerate(ids_T.tolist()) if rollouts[sample] == rollout and mask_T[t]]
        means.append(sum(float(values_T[t]) for t in places) / len(places) if places else 0.0)
    weights_T = per_rollout_weights(mask_T, ids_T, rollout_ids_S=torch.tensor(rollouts))
    assert (weights_T * values_T).sum().item() == pytest.approx(sum(means) / len(means))
    assert torch.equal(weights_T != 0, mask_T != 0)


@given(masks=MASKS)
def test_one_sample_a_rollout_is_the_mean_over_samples(masks: list[list[int]]) -> None:
    mask_T, ids_T = flat(masks)
    rollout_ids_S = 100 - torch.arange(len(masks))
    expected = per_sample_weights(mask_T, ids_T, len(masks))
    assert torch.equal(per_rollout_weights(mask_T, ids_T, rollout_ids_S=rollout_ids_S), expected)


@given(masks=MASKS, max_length=st.integers(6, 99))
def test_constant_weights_divide_the_sum_over_tokens_by_a_constant(masks: list[list[int]], max_length: int) -> None:
    mask_T, _ = flat(masks)
    values_T = values_like(mask_T)
    expected = float(values_T[mask_T.bool()].sum()) / (len(masks) * max_length)
    weighted = (constant_weights(mask_T, len(masks), max_length=max_length) * values_T).sum()
    assert weighted.item() == pytest.approx(expected)
