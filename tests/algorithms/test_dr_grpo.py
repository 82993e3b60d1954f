from __future__ import annotations

import torch

from slime.algorithms import dr_grpo, grpo
from slime.algorithms.reduce import constant_weights, per_sample_weights


def test_uneven_groups_are_centered_and_not_scaled() -> None:
    rewards_S, ids_S = torch.tensor([5.0, 0, 0, 3, 1, 1, 1, 1, 6]), torch.tensor([9, 2, 2, 2, 4, 4, 4, 4, 4])
    assert dr_grpo.advantages(rewards_S, ids_S).tolist() == [0, -1, -1, 2, -1, -1, -1, -1, 4]


def test_the_std_of_a_group_changes_nothing_but_in_grpo() -> None:
    rewards_S, ids_S = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 0, 0])
    torch.testing.assert_close(dr_grpo.advantages(2 * rewards_S, ids_S), 2 * dr_grpo.advantages(rewards_S, ids_S))
    torch.testing.assert_close(
        grpo.advantages(2 * rewards_S, ids_S, std_normalize=True),
        grpo.advantages(rewards_S, ids_S, std_normalize=True),
        rtol=1e-5,
        atol=0,
    )


def test_a_token_of_a_long_response_weighs_as_much_as_one_of_a_short_response() -> None:
    mask_T, ids_T = torch.ones(5), torch.tensor([0, 1, 1, 1, 1])
    assert constant_weights(mask_T, 2, max_length=10).tolist() == torch.full((5,), 1 / 20).tolist()
    assert per_sample_weights(mask_T, ids_T, 2).tolist() == [0.5, 0.125, 0.125, 0.125, 0.125]
