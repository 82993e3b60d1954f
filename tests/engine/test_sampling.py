"""Drawing tokens: against the distribution, and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slime.engine.embedded import sampling
from slime.engine.embedded.sampling import SamplingTable, derive_seed, sample, uniform
from slime.engine.embedded.sampling_params import SamplingParams

VOCABULARY = 12


def draw(logits: torch.Tensor, params: SamplingParams, *, seed: int = 0, first: int = 0) -> sampling.Drawn:
    """One token for each row of logits, under one seed and consecutive counters."""
    table = SamplingTable(1)
    table.set_row(0, params, seed)
    rows = np.zeros(len(logits), dtype=np.int64)
    return sample(logits.clone(), table, rows, np.arange(first, first + len(logits)), num_top=3)


def logits_like(row: torch.Tensor, count: int) -> torch.Tensor:
    return row.expand(count, -1).contiguous()


@pytest.fixture
def row() -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def test_uniform_numbers_are_uniform_and_in_range() -> None:
    numbers = uniform(np.full(20000, 7), np.arange(20000))
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 2000).max() < 5 * 2000**0.5


def test_a_number_depends_on_its_seed_and_counter_alone() -> None:
    seeds, counters = np.array([5, 6, 5]), np.array([0, 0, 1])
    together = uniform(seeds, counters)
    assert len(set(together)) == 3
    for place in range(3):
        assert uniform(seeds[place : place + 1], counters[place : place + 1])[0] == together[place]


def test_derived_seeds_differ() -> None:
    assert len({derive_seed(seed, index) for seed in range(10) for index in range(10)}) == 100


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(row: torch.Tensor, temperature: float) -> None:
    count = 40000
    drawn = draw(logits_like(row, count), SamplingParams(temperature=temperature))
    expected = torch.softmax(row / temperature, -1) * count
    counts = torch.bincount(torch.tensor(drawn.tokens), minlength=VOCABULARY)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 40  # 11 degrees of freedom: beyond it once in 30,000


def test_log_probs_are_those_of_the_scaled_distribution_before_cutting(row: torch.Tensor) -> None:
    drawn = draw(logits_like(row, 50), SamplingParams(temperature=0.7, top_k=4, top_p=0.9, min_p=0.01))
    expected = torch.log_softmax(row / 0.7, -1)
    assert drawn.log_probs == [expected[token].item() for token in drawn.tokens]


def test_the_top_is_reported_most_likely_first(row: torch.Tensor) -> None:
    drawn = draw(logits_like(row, 2), SamplingParams())
    expected = torch.log_softmax(row, -1).topk(3)
    assert drawn.top_tokens is not None
    assert drawn.top_log_probs is not None
    assert drawn.top_tokens[1].tolist() == expected.indices.tolist()
    assert torch.equal(drawn.top_log_probs[1], expected.values)


def allowed_tokens(row: torch.Tensor, params: SamplingParams) -> set[int]:
    """Plain loop over the tokens from the most likely one down."""
    probs = torch.softmax(row / params.temperature, -1)
    allowed: set[int] = set()
    total = 0.0
    for rank, token in enumerate(probs.argsort(descending=True).tolist()):
        if params.top_k > 0 and rank >= params.top_k:
            break
        if total > params.top_p or probs[token] < params.min_p * probs.max():
            break
        allowed.add(token)
        total += probs[token].item()
    return allowed


@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8},
        {"top_k": 5, "top_p": 0.95, "min_p": 0.1},
    ],
)
def test_cutting_leaves_exactly_the_allowed_tokens_in_proportion(row: torch.Tensor, cut: dict[str, float]) -> None:
    params = SamplingParams(temperature=1.5, **cut)
    count = 20000
    tokens = draw(logits_like(row, count), params).tokens
    allowed = allowed_tokens(row, params)
    assert set(tokens) == allowed
    weights = torch.softmax(row / 1.5, -1)
    total = sum(weights[token].item() for token in allowed)
    for token in allowed:
        share = weights[token].item() / total
        assert tokens.count(token) == pytest.approx(count * share, abs=5 * (count * share) ** 0.5)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_k=1)])
def test_greedy_takes_the_most_likely_token_at_temperature_one(row: torch.Tensor, params: SamplingParams) -> None:
    drawn = draw(logits_like(row, 4), params)
    assert drawn.tokens == [row.argmax().item()] * 4
    assert drawn.log_probs[0] == torch.log_softmax(row, -1).max().item()


def test_rows_with_other_parameters_do_not_disturb_each_other(row: torch.Tensor) -> None:
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=2),
        SamplingParams(temperature=0.3),
    ]
    table = SamplingTable(len(kinds))
    for place, params in enumerate(kinds):
        table.set_row(place, params, seed=place)
    rows = np.arange(len(kinds))
    together = sample(logits_like(row, len(kinds)), table, rows, rows * 10)
    for place in rows:
        alone = sample(logits_like(row, 1), table, rows[place : place + 1], rows[place : place + 1] * 10)
        assert alone.tokens[0] == together.tokens[place]
        assert alone.log_probs[0] == together.log_probs[place]


def test_blocks_of_rows_draw_as_one(row: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_like(row, 30)
    whole = draw(logits, SamplingParams(top_k=7))
    monkeypatch.setattr(sampling, "MAX_ELEMENTS", 4 * VOCABULARY)
    parts = draw(logits, SamplingParams(top_k=7))
    assert parts.tokens == whole.tokens
    assert parts.log_probs == whole.log_probs


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    row = torch.full((VOCABULARY,), float("-inf"))
    row[[2, 9]] = 0.0
    assert set(draw(logits_like(row, 1000), SamplingParams()).tokens) == {2, 9}
