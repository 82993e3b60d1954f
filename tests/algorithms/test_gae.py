from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algorithms.gae import Discount, Estimate, gae
from slime.algorithms.reinforce_plus_plus import returns

Token = tuple[float, float, bool]  # reward, value, trained
TOKEN = st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.booleans())
SEQUENCES = st.lists(st.lists(TOKEN, min_size=1, max_size=7), min_size=1, max_size=5)
DISCOUNTS = [Discount(), Discount(0.9, 0.8), Discount(1.0, 0.0), Discount(0.0, 1.0)]


def estimate(sequences: list[list[Token]], discount: Discount) -> Estimate:
    """Masked tokens hold what no result may see."""
    tokens = [token if token[2] else (math.nan, math.inf, False) for sequence in sequences for token in sequence]
    rewards_T, values_T, mask_T = torch.tensor(tokens, dtype=torch.float64).T
    ids_T = torch.tensor([index for index, sequence in enumerate(sequences) for _ in sequence])
    return gae(rewards_T, values_T, mask_T=mask_T, sequence_ids_T=ids_T, discount=discount)


def oracle(sequence: list[Token], discount: Discount) -> list[tuple[float, float]]:
    """Advantage and return of each token by the sum of eq. 16, over the trained tokens alone."""
    chain = [(reward, value) for reward, value, trained in sequence if trained]
    values = [value for _, value in chain] + [0.0]
    deltas = [reward + discount.gamma * values[i + 1] - values[i] for i, (reward, _) in enumerate(chain)]
    decay = discount.gamma * discount.lambd
    result, position = [], 0
    for _, value, trained in sequence:
        if not trained:
            result.append((0.0, 0.0))
            continue
        advantage = sum(decay**k * delta for k, delta in enumerate(deltas[position:]))
        result.append((advantage, advantage + value))
        position += 1
    return result


@pytest.mark.parametrize("discount", DISCOUNTS)
@given(sequences=SEQUENCES)
def test_advantages_and_returns_equal_a_sum_over_trained_tokens(
    discount: Discount, sequences: list[list[Token]]
) -> None:
    result = estimate(sequences, discount)
    expected = [pair for sequence in sequences for pair in oracle(sequence, discount)]
    assert result.advantages_T.tolist() == pytest.approx([a for a, _ in expected], abs=1e-9)
    assert result.returns_T.tolist() == pytest.approx([r for _, r in expected], abs=1e-9)


@given(sequences=SEQUENCES, seed=st.integers(0, 99))
def test_the_order_and_company_of_sequences_change_nothing(sequences: list[list[Token]], seed: int) -> None:
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)
    alone = [estimate([sequences[index]], DISCOUNTS[1]).advantages_T for index in order]
    together = estimate([sequences[index] for index in order], DISCOUNTS[1]).advantages_T
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_a_tools_output_is_no_step_of_the_chain() -> None:
    spoken = [(0.0, 1.0, True), (2.0, 3.0, True)]
    with_tool = [spoken[0], (9.0, 9.0, False), (9.0, 9.0, False), spoken[1], (9.0, 9.0, False)]
    plain, interrupted = estimate([spoken], DISCOUNTS[1]), estimate([with_tool], DISCOUNTS[1])
    assert interrupted.advantages_T[[0, 3]].tolist() == plain.advantages_T.tolist()
    assert interrupted.returns_T[[0, 3]].tolist() == plain.returns_T.tolist()


def test_a_perfect_critic_leaves_no_advantage() -> None:
    result = estimate([[(0.0, 3.0, True), (1.0, 3.0, True), (2.0, 2.0, True)]], Discount(1.0, 0.95))
    assert result.advantages_T.tolist() == pytest.approx([0.0, 0.0, 0.0])


def test_with_lambda_one_returns_are_those_of_reinforce_plus_plus() -> None:
    rewards_T, values_T = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask_T, ids_T = torch.tensor([1.0, 1, 0, 1, 1, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3])
    result = gae(rewards_T, values_T, mask_T=mask_T, sequence_ids_T=ids_T, discount=Discount(0.9, 1.0))
    torch.testing.assert_close(result.returns_T, returns(rewards_T, mask_T, sequence_ids_T=ids_T, gamma=0.9))
