"""The radix tree of known prefixes, against a list of the sequences that were inserted."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.engine.embedded.kv_cache import PAGE_SIZE, KVCache
from slime.engine.embedded.prefix_cache import PrefixCache, common_length

NUM_PAGES = 60

token = st.integers(0, 1)
sequence = st.lists(token, min_size=1, max_size=4).flatmap(
    lambda head: st.integers(1, 3).flatmap(
        lambda repeat: st.lists(token, max_size=3).map(lambda tail: head * (repeat * 6) + tail)
    )
)


class Writer:
    """Uses the tree as the scheduler does, and knows what every page holds: its tokens, written through `write`."""

    def __init__(self) -> None:
        self.cache = KVCache(1, 1, 1, num_tokens=NUM_PAGES * PAGE_SIZE, dtype=torch.float32, device=torch.device("cpu"))
        self.prefixes = PrefixCache(self.cache)
        self.contents: dict[int, list[int]] = {}

    def write(self, tokens: list[int]) -> int:
        """Makes a sequence known, sharing what is known already; returns how much was."""
        length, pages = self.prefixes.match(tokens, len(tokens) - 1)
        self.cache.share(pages)
        wanted = -(-len(tokens) // PAGE_SIZE) - length // PAGE_SIZE
        if self.cache.num_free_pages < wanted:
            self.prefixes.evict(wanted)
        own = self.cache.allocate(wanted)
        if length % PAGE_SIZE:
            self.contents[own[0]] = self.contents[pages[-1]][: length % PAGE_SIZE]
            self.cache.free([pages.pop()])
        else:
            self.contents.update({page: [] for page in own[:1]})
        pages += own
        for place in range(length, len(tokens)):
            page = pages[place // PAGE_SIZE]
            self.contents[page] = [*self.contents.get(page, [])[: place % PAGE_SIZE], tokens[place]]
        self.prefixes.insert(tokens, pages)
        self.cache.free(pages)
        return length

    def check(self, tokens: list[int], length: int, pages: list[int]) -> None:
        """The pages of a match hold its tokens."""
        held = [self.contents[pages[place // PAGE_SIZE]][place % PAGE_SIZE] for place in range(length)]
        assert held == tokens[:length]


@given(st.lists(sequence, min_size=1, max_size=8))
def test_a_match_is_the_longest_common_prefix_with_anything_inserted(sequences: list[list[int]]) -> None:
    writer = Writer()
    known: list[list[int]] = []
    for tokens in sequences:
        expected = max((common_length(tokens[:-1], other) for other in known), default=0)
        assert writer.write(tokens) == expected
        known.append(tokens)
        for other in known:
            match = writer.prefixes.match(other, len(other))
            assert match.length == len(other)
            writer.check(other, match.length, match.pages)


@given(st.lists(sequence, max_size=8))
def test_a_cleared_tree_gives_all_pages_back(sequences: list[list[int]]) -> None:
    writer = Writer()
    for tokens in sequences:
        writer.write(tokens)
    writer.prefixes.clear()
    assert writer.cache.num_free_pages == NUM_PAGES
    assert writer.prefixes.num_tokens == 0


@given(st.lists(sequence, min_size=1, max_size=8), st.integers(1, NUM_PAGES))
def test_eviction_frees_what_is_asked_and_leaves_a_sound_tree(sequences: list[list[int]], wanted: int) -> None:
    writer = Writer()
    for tokens in sequences:
        writer.write(tokens)
    writer.prefixes.evict(wanted)
    assert writer.cache.num_free_pages >= wanted
    for tokens in sequences:
        length, pages = writer.prefixes.match(tokens, len(tokens))
        writer.check(tokens, length, pages)
    writer.prefixes.evict(NUM_PAGES)
    assert writer.cache.num_free_pages == NUM_PAGES


def test_the_least_recently_used_goes_first() -> None:
    writer = Writer()
    old, new = [1] * PAGE_SIZE, [2] * PAGE_SIZE
    writer.write(old)
    writer.write(new)
    writer.prefixes.match(old, PAGE_SIZE)
    writer.prefixes.evict(NUM_PAGES - 1)
    assert writer.prefixes.match(old, PAGE_SIZE).length == PAGE_SIZE
    assert writer.prefixes.match(new, PAGE_SIZE).length == 0


@given(st.lists(token, max_size=20), st.lists(token, max_size=20))
def test_common_length_counts_equal_leading_elements(a: list[int], b: list[int]) -> None:
    count = common_length(a, b)
    assert a[:count] == b[:count]
    assert count == min(len(a), len(b)) or a[count] != b[count]
