from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from slime.data.convert import batch_from_dict

PLAIN: dict[str, Any] = {"tokens": [[1, 2, 3], [4, 5]], "response_lengths": [2, 1], "rewards": [0.5, -1]}


def test_the_required_keys_alone_make_a_batch_of_final_rewards() -> None:
    batch = batch_from_dict(PLAIN)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5]
    assert batch.rewards.tolist() == [0.5, -1.0]
    assert batch.rewards_are_final
    assert batch.loss_mask.tolist() == [1, 1, 1]
    assert len(set(batch.group_ids.tolist())) == len(set(batch.rollout_ids.tolist())) == 2


def test_every_optional_key_finds_its_place() -> None:
    extra: dict[str, Any] = {
        "loss_masks": [torch.tensor([0, 1]), [1]],
        "rollout_log_probs": [np.array([-0.5, -1.5]), [-2.0]],
        "teacher_log_probs": [[-3.0, -4.0], [-5.0]],
        "sample_indices": [8, 9],
        "rollout_ids": [3, 3],
        "group_indices": [7, 7],
        "raw_reward": [1, 0],
    }
    batch = batch_from_dict(PLAIN | extra)
    assert batch.loss_mask.tolist() == [0, 1, 1]
    assert batch.rollout_log_probs is not None
    assert batch.rollout_log_probs.tolist() == [-0.5, -1.5, -2.0]
    assert batch.teacher_log_probs is not None
    assert batch.teacher_log_probs.tolist() == [-3, -4, -5]
    assert batch.sample_indices.tolist() == [8, 9]
    assert batch.rollout_ids.tolist() == [3, 3]
    assert batch.group_ids.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, "has no 'rewards'; it needs tokens, response_lengths, rewards"),
        ({"reward": [1, 2]}, "unknown key 'reward'"),
        ({"rewards": [1.0]}, "has 2 tokens entries but 1 of 'rewards'"),
        ({"loss_masks": [[1], [1]]}, "sample 0: loss_mask has 1 entries, the response has 2 tokens"),
        ({"rewards": [1.0, float("nan")]}, "sample 1: .* must be finite"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_from_dict(PLAIN | change)
