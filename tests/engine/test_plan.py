"""How a pass is laid out."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.engine.embedded import plan
from slime.engine.embedded.kv_cache import PAGE_SIZE
from slime.engine.embedded.plan import BLOCK_OVERHEAD, Batch, Limits, Plan, decode_ranges, make_plan, round_up_length


def cost(num_pages: list[int], ends: tuple[int, ...]) -> int:
    """Pages read by ranges that end at `ends`, and their overhead; lengths count as rounded."""
    total, start = 0, 0
    for end in ends:
        total += BLOCK_OVERHEAD + (end - start) * round_up_length(num_pages[end - 1])
        start = end
    return total


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9).map(sorted))
def test_decode_ranges_cost_as_little_as_any(num_pages: list[int]) -> None:
    count = len(num_pages)
    every = (
        (*cut, count) for size in range(count) for cut in itertools.combinations(range(1, count), size)
    )  # all ways to cut
    best = min(cost(num_pages, ends) for ends in every)
    ranges = decode_ranges(num_pages)
    assert cost(num_pages, tuple(end for _, end in ranges)) == best
    assert [start for start, _ in ranges] == [0] + [end for _, end in ranges[:-1]]


@given(st.integers(1, 5000))
def test_rounding_adds_a_third_at_most(length: int) -> None:
    assert length <= round_up_length(length) <= max(length + 1, length * 3 // 2)


def make_batch(spans: list[tuple[int, int]]) -> Batch:
    """Sequences with disjoint pages, sequence b computing the tokens of its span."""
    starts, ends = (np.array(values) for values in zip(*spans, strict=True))
    width = -(-int(ends.max()) // PAGE_SIZE)
    table = np.arange(1, len(spans) * width + 1).reshape(len(spans), width)
    tokens = list(range(int((ends - starts).sum())))
    rows = np.arange(len(spans))
    return Batch(tokens, rows, starts, ends, table)


def make(batch: Batch) -> Plan:
    return make_plan(batch, Limits(16, 4, 4, max_decode_pages=40), device=torch.device("cpu"))


def attended(made: Plan, padding: int) -> list[tuple[int, int, int]]:
    """Every real query of the plan's blocks: its token, its position, its first page."""
    found = []
    for block in made.blocks:
        count = block.num_sequences * block.num_queries
        tokens = range(*block.tokens.indices(10**6)) if isinstance(block.tokens, slice) else block.tokens.tolist()
        pages = block.pages.view(block.num_sequences, -1)[:, 0].repeat_interleave(block.num_queries).tolist()
        assert len(tokens) == count
        found += [
            item for item in zip(tokens, block.positions.flatten().tolist(), pages, strict=True) if item[0] != padding
        ]
    return sorted(found)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 70)), min_size=1, max_size=12), st.booleans())
def test_every_token_attends_once_at_its_place(spans: list[tuple[int, int]], small: bool) -> None:
    spans = sorted(((start, start + count) for start, count in spans), key=lambda s: (s[1] - s[0] > 1, s[1]))
    batch = make_batch(spans)
    limit = plan.MAX_SCORES
    try:
        plan.MAX_SCORES = 4 * 4 * PAGE_SIZE * 8 if small else limit
        made = make(batch)
    finally:
        plan.MAX_SCORES = limit
    assert len(made.positions) % 16 == 0
    expected, first = [], 0
    for row, (start, end) in enumerate(spans):
        expected += [(first + i - start, i, int(batch.page_table[row, 0])) for i in range(start, end)]
        first += end - start
    assert attended(made, len(made.positions)) == expected
    assert made.positions[: made.num_tokens].tolist() == [position for _, position, _ in expected]


def test_decode_blocks_read_few_pages_unless_that_leaves_few_sequences() -> None:
    def sizes(length: int, max_pages: int) -> list[int]:
        batch = make_batch([(length - 1, length)] * 33)
        made = make_plan(batch, Limits(16, 4, 4, max_decode_pages=max_pages), device=torch.device("cpu"))
        return [block.num_sequences for block in made.blocks]

    assert sizes(2 * PAGE_SIZE, 66) == [33]
    assert sizes(2 * PAGE_SIZE, 40) == [17, 16]
    assert sizes(2 * PAGE_SIZE, 1) == [8, 8, 8, 8, 1]


def test_keys_are_written_where_the_page_table_says() -> None:
    made = make(make_batch([(PAGE_SIZE + 4, PAGE_SIZE + 5), (PAGE_SIZE - 2, PAGE_SIZE + 2)]))
    page = {row: [row * 2 + 1, row * 2 + 2] for row in range(2)}
    expected = [page[0][1] * PAGE_SIZE + 4] + [
        page[1][position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        for position in range(PAGE_SIZE - 2, PAGE_SIZE + 2)
    ]
    assert made.slots[:5].tolist() == expected
    assert set(made.slots[5:].tolist()) == {0}


def test_a_query_sees_itself_and_what_is_before_it_within_the_window() -> None:
    (block,) = make(make_batch([(0, 6)])).blocks
    visible = block.bias(None)[0, :6, 0, :6] == 0
    assert torch.equal(visible, torch.ones(6, 6, dtype=torch.bool).tril())
    near = block.bias(2)[0, :6, 0, :6] == 0
    assert torch.equal(near, torch.ones(6, 6, dtype=torch.bool).tril() & ~torch.ones(6, 6, dtype=torch.bool).tril(-2))
