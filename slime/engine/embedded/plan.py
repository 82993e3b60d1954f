"""One forward pass laid out: its tokens, where their keys and values go, and the rectangles in which they attend.

Legend: T tokens of the pass, B sequences in it, P page size; a *block* is a rectangle of S sequences with Q query
tokens each over K cached tokens, a multiple of P.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from slime.engine.embedded.kv_cache import DUMMY_PAGE, PAGE_SIZE

MAX_SCORES = 1 << 22
"""Attention scores of one block at most: 16 MiB in float32, about what a CPU keeps in its cache."""

QUERY_BLOCK = 64
"""Queries of one sequence in a block at most: of the rectangle, what they must not see is computed in vain."""

MIN_DECODES = 8
"""Sequences of a decode block, where there are so many: fewer cost more in overhead than they can save."""

BLOCK_OVERHEAD = 20
"""What one more block costs in a forward pass, in pages read (measured with a tiny model)."""


@dataclass(frozen=True)
class Batch:
    """The sequences of a pass: b computes its tokens starts[b] to ends[b]; page_table[rows[b]] names its pages.

    tokens: of all sequences, one after the other [T]. Sequences with one new token come first, sorted by length.
    """

    tokens: list[int]
    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    page_table: np.ndarray


@dataclass(slots=True)
class Block:
    """A rectangle of queries and keys.

    tokens: a slice of the pass's tokens where the block is one without padding, else the token of each query [S * Q],
    and the number of tokens for padding. pages: [S * K / P]; positions: of the queries [S, Q].
    """

    num_sequences: int
    num_queries: int
    num_keys: int
    tokens: slice | Tensor
    pages: Tensor
    positions: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def bias(self, window: int | None) -> Tensor:
        """What is added to scores, float32 [S, Q, 1, K]: 0 where a query sees a key, else minus infinity.

        A query sees itself and what is before it, at most `window` tokens in all where one is given.
        """
        bias = self._masks.get(window)
        if bias is None:
            keys = torch.arange(self.num_keys, device=self.positions.device)
            hidden = keys > self.positions[:, :, None, None]
            if window is not None:
                hidden |= keys <= self.positions[:, :, None, None] - window
            bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -math.inf)
            self._masks[window] = bias
        return bias


@dataclass(slots=True)
class Plan:
    """A pass of `num_tokens` tokens, padded to T. positions, slots (where keys and values are written): [T]."""

    num_tokens: int
    positions: Tensor
    slots: Tensor
    blocks: list[Block]


@dataclass(frozen=True)
class Limits:
    """What a model and a device ask of a plan.

    row_multiple: the pass's tokens are padded to one. num_query_heads: bounds the memory of scores. min_rows: queries
    that a prefill block has at least. max_decode_pages: pages that a decode block gathers, unless MIN_DECODES are more.
    """

    row_multiple: int
    num_query_heads: int
    min_rows: int
    max_decode_pages: int


def make_plan(batch: Batch, limits: Limits, *, device: torch.device) -> Plan:
    """The plan of a pass over a batch."""
    lengths = batch.ends - batch.starts
    firsts = np.cumsum(lengths) - lengths
    num_tokens = len(batch.tokens)
    padded = num_tokens + -num_tokens % limits.row_multiple
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.zeros(padded, dtype=np.int64)
    positions[:num_tokens] = np.arange(num_tokens) - firsts[sequence] + batch.starts[sequence]
    slots = np.full(padded, DUMMY_PAGE * PAGE_SIZE, dtype=np.int64)
    place = positions[:num_tokens]
    slots[:num_tokens] = batch.page_table[batch.rows[sequence], place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE
    num_decodes = int(np.count_nonzero(lengths == 1))
    num_pages = -(-batch.ends // PAGE_SIZE)
    to_device = _ToDevice(device)
    blocks = []
    for start, end in _cut_ranges(num_pages[:num_decodes].tolist(), limits.max_decode_pages):
        pages = batch.page_table[batch.rows[start:end], : num_pages[end - 1]]
        blocks.append(_block(slice(start, end), pages, batch.starts[start:end, None], to_device))
    for group in _prefill_groups(firsts, batch, num_decodes, limits.num_query_heads):
        blocks.append(_prefill_block(group, batch, padded, limits.min_rows, to_device))
    return Plan(num_tokens, to_device(positions), to_device(slots), blocks)


class _ToDevice:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def round_up_length(length: int) -> int:
    """The next multiple of an eighth of the power of two below: few sizes, padded by an eighth at most."""
    granule = max(1, (1 << (length.bit_length() - 1)) // 8)
    return -(-length // granule) * granule


def decode_ranges(num_pages: list[int]) -> list[tuple[int, int]]:
    """Cuts sequences, sorted by their number of pages, into ranges: the fewest pages read, plus BLOCK_OVERHEAD a range.

    A dynamic programme over the distinct numbers of pages, of which long ones are taken together.
    """
    ends: list[tuple[int, int]] = []
    for index, pages in enumerate(num_pages):
        size = round_up_length(pages)
        if ends and ends[-1][1] == size:
            ends[-1] = (index + 1, size)
        else:
            ends.append((index + 1, size))
    starts = [0] + [end for end, _ in ends]
    best: list[tuple[int, int]] = [(0, 0)]
    for last, (end, size) in enumerate(ends):
        costs = [(best[first][0] + BLOCK_OVERHEAD + (end - starts[first]) * size, first) for first in range(last + 1)]
        best.append(min(costs))
    ranges, last = [], len(ends)
    while last > 0:
        first = best[last][1]
        ranges.append((starts[first], starts[last]))
        last = first
    return ranges[::-1]


def _cut_ranges(num_pages: list[int], max_pages: int) -> list[tuple[int, int]]:
    """The decode ranges, cut evenly so that each reads at most so many pages, or MIN_DECODES sequences."""
    ranges = []
    for start, end in decode_ranges(num_pages):
        count = -(-(end - start) * num_pages[end - 1] // max_pages)
        step = max(MIN_DECODES, -(-(end - start) // count))
        ranges += [(first, min(first + step, end)) for first in range(start, end, step)]
    return ranges


@dataclass(slots=True)
class _Chunk:
    """Tokens [first, first + length) of the pass, at `position` of the sequence with page-table row `row`."""

    first: int
    length: int
    position: int
    row: int

    @property
    def num_pages(self) -> int:
        return -(-(self.position + self.length) // PAGE_SIZE)


def _prefill_groups(firsts: np.ndarray, batch: Batch, num_decodes: int, num_query_heads: int) -> list[list[_Chunk]]:
    """Groups of chunks of like length and like number of pages, whose scores fit MAX_SCORES; long ones are cut."""
    groups: dict[tuple[int, int], list[_Chunk]] = {}
    for index in range(num_decodes, len(firsts)):
        first, start, end, row = (int(array[index]) for array in (firsts, batch.starts, batch.ends, batch.rows))
        step = min(QUERY_BLOCK, max(1, MAX_SCORES // (-(-end // PAGE_SIZE) * PAGE_SIZE * num_query_heads)))
        cuts = [start, *range((start // step + 1) * step, end, step), end]
        for position, stop in itertools.pairwise(cuts):
            chunk = _Chunk(first + position - start, stop - position, position, row)
            key = (_round_up_queries(chunk.length), round_up_length(chunk.num_pages))
            groups.setdefault(key, []).append(chunk)
    limited = []
    for (num_queries, num_pages), group in groups.items():
        count = max(1, MAX_SCORES // (num_queries * num_pages * PAGE_SIZE * num_query_heads))
        limited += [group[start : start + count] for start in range(0, len(group), count)]
    return limited


def _round_up_queries(length: int) -> int:
    """The next power of two: few sizes, so that many chunks share a block."""
    return 1 << (length - 1).bit_length()


def _prefill_block(group: list[_Chunk], batch: Batch, padding_token: int, min_rows: int, to_device: _ToDevice) -> Block:
    num_pages = max(chunk.num_pages for chunk in group)
    num_queries = max(min_rows, _round_up_queries(max(chunk.length for chunk in group)))
    fields = np.array([(chunk.first, chunk.length, chunk.position, chunk.row) for chunk in group])
    first, length, position, row = (fields[:, column, None] for column in range(4))
    offset = np.arange(num_queries)[None]
    tokens = np.where(offset < length, first + offset, padding_token)
    positions = position + np.minimum(offset, length - 1)
    return _block(to_device(tokens.reshape(-1)), batch.page_table[row[:, 0], :num_pages], positions, to_device)


def _block(tokens: slice | Tensor, pages: np.ndarray, positions: np.ndarray, to_device: _ToDevice) -> Block:
    num_sequences, num_pages = pages.shape
    return Block(
        num_sequences,
        positions.shape[1],
        num_pages * PAGE_SIZE,
        tokens,
        to_device(pages.reshape(-1)),
        to_device(positions),
    )
