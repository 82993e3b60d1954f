"""Attention of packed tokens over the paged cache, called by Hugging Face's model code in place of its own.

Legend: T tokens of a forward pass, Hq query and H key-value heads, G = Hq / H, D head dimension, P page size;
a *block* is a rectangle of S sequences with Q query tokens each over K cached tokens (a multiple of P).

Exactness. In float32 on a CPU a token's result must not depend, to the bit, on its neighbours. Matrix products sum in an order that
depends on the shape only below 4 rows and beyond 192 summands (measured on MKL, one and two threads), so a product here has at least
MIN_ROWS rows, and probabilities times values is summed over KEY_CHUNK tokens at a time. Padded keys get weight 0, which adds exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from slime.engine.embedded.kv_cache import DUMMY_PAGE, PAGE_SIZE, KVCache

MIN_ROWS = 4
KEY_CHUNK = 128
MAX_SCORES = 1 << 24
"""Attention scores of one block at most (64 MiB in float32)."""

BLOCK_OVERHEAD = 80
"""What one more block costs in a forward pass, in pages read (measured with a tiny model)."""


@dataclass(slots=True)
class Block:
    """A rectangle of queries and keys.

    tokens: a slice of the pass's tokens where the block is one without padding, else the token of each query [S * Q], and the
    number of tokens for padding. pages: [S * K / P]; positions: of the queries [S, Q].
    """

    num_sequences: int
    num_queries: int
    num_keys: int
    tokens: slice | Tensor
    pages: Tensor
    positions: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def is_visible(self, window: int | None) -> Tensor:
        """Which keys each query sees: bool [S, Q, K], causal and, where given, at most `window` tokens back."""
        mask = self._masks.get(window)
        if mask is None:
            keys = torch.arange(self.num_keys, device=self.positions.device)
            mask = keys <= self.positions[:, :, None]
            if window is not None:
                mask &= keys > self.positions[:, :, None] - window
            self._masks[window] = mask
        return mask


@dataclass(slots=True)
class Plan:
    """One forward pass: where its tokens' keys and values go, and the blocks that attend. slots: [T]; T - num_tokens are padding."""

    num_tokens: int
    slots: Tensor
    blocks: list[Block]


class Segment:
    """The new tokens of one sequence in a pass: tokens [first, first + length) of the pass, at `position` of the sequence."""

    __slots__ = ("first", "length", "position", "pages")

    def __init__(self, first: int, length: int, position: int, pages: list[int]) -> None:
        self.first, self.length, self.position, self.pages = first, length, position, pages


class PagedAttention:
    """The attention function of one model; `plan` is set before each forward pass."""

    def __init__(self, cache: KVCache, *, exact: bool) -> None:
        self.plan: Plan | None = None
        self._cache, self._exact = cache, exact
        self._scratch: dict[str, Tensor] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_unused: object,
    ) -> tuple[Tensor, None]:
        """Stores key and value [1, H, T, D], attends with query [1, Hq, T, D]; returns [1, T, Hq, D], as transformers asks."""
        assert self.plan is not None, "the model ran without a plan"
        keys, values = self._cache.keys_values(module.layer_idx)
        num_heads, head_dim = keys.shape[0], keys.shape[-1]
        keys.view(num_heads, -1, head_dim).index_copy_(1, self.plan.slots, key[0])
        values.view(num_heads, -1, head_dim).index_copy_(1, self.plan.slots, value[0])
        scale = scaling if scaling is not None else head_dim**-0.5
        output = query.new_empty(query.shape[2] + 1, query.shape[1], head_dim)
        output[self.plan.num_tokens :] = 0  # else padding could bring a NaN into the dummy page, and from there to others
        attend = self._attend_exactly if self._exact else _attend
        for block in self.plan.blocks:
            rows = self._queries(query[0], block, num_heads)
            flat_keys = self._gather("keys", keys, block)
            flat_values = self._gather("values", values, block)
            result = attend(rows * scale, flat_keys, flat_values, block.is_visible(sliding_window), softcap)
            _scatter(output, result, block)
        return output[None, :-1], None

    def _queries(self, query: Tensor, block: Block, num_heads: int) -> Tensor:
        """The block's queries, [H, S, Q, G, D], of query [Hq, T, D]."""
        if isinstance(block.tokens, slice):
            picked = query[:, block.tokens]
        else:
            picked = query.index_select(1, block.tokens.clamp(max=query.shape[1] - 1))
        shape = (num_heads, -1, block.num_sequences, block.num_queries, query.shape[-1])
        return picked.reshape(shape).permute(0, 2, 3, 1, 4)

    def _gather(self, name: str, pool: Tensor, block: Block) -> Tensor:
        """The block's pages side by side: [H, S, K, D] of pool [H, N, P, D], in memory that is used again."""
        num_heads, _, _, head_dim = pool.shape
        size = num_heads * block.num_sequences * block.num_keys * head_dim
        scratch = self._scratch.get(name)
        if scratch is None or scratch.numel() < size:
            scratch = self._scratch[name] = pool.new_empty(size)
        target = scratch[:size].view(num_heads, len(block.pages), PAGE_SIZE, head_dim)
        torch.index_select(pool, 1, block.pages, out=target)
        return target.view(num_heads, block.num_sequences, block.num_keys, head_dim)

    def _attend_exactly(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
        """Attention whose every query's result is a function of that query's keys alone. Shapes as `_attend`."""
        num_heads, num_sequences, num_queries, group, head_dim = query.shape
        padded = max(num_queries, -(-MIN_ROWS // group))
        if padded > num_queries:
            query = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, padded - num_queries))
        rows = query.reshape(num_heads * num_sequences, padded * group, head_dim)
        flat_key = key.view(num_heads * num_sequences, -1, head_dim)
        flat_value = value.view(num_heads * num_sequences, -1, head_dim)
        scores = torch.bmm(rows, flat_key.transpose(1, 2))
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        by_query = scores.view(num_heads, num_sequences, padded, group, -1)[:, :, :num_queries]
        by_query.masked_fill_(~visible[:, :, None], -math.inf)
        weights = torch.softmax(scores, dim=-1)
        output = torch.bmm(weights[:, :, :KEY_CHUNK], flat_value[:, :KEY_CHUNK])
        for start in range(KEY_CHUNK, flat_value.shape[1], KEY_CHUNK):
            chunk = slice(start, start + KEY_CHUNK)
            output += torch.bmm(weights[:, :, chunk], flat_value[:, chunk])
        return output.view(num_heads, num_sequences, padded, group, head_dim)[:, :, :num_queries]


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    """Attention of query [H, S, Q, G, D], scaled, over key and value [H, S, K, D]; visible [S, Q, K]. Returns query's shape."""
    num_heads, num_sequences, num_queries, group, head_dim = query.shape
    by_sequence = query.reshape(num_heads, num_sequences, num_queries * group, head_dim).transpose(0, 1)
    mask = visible[:, None, :, None].expand(-1, 1, -1, group, -1).reshape(num_sequences, 1, num_queries * group, -1)
    if softcap is None:
        result = torch.nn.functional.scaled_dot_product_attention(
            by_sequence, key.transpose(0, 1), value.transpose(0, 1), attn_mask=mask, scale=1.0
        )
    else:
        scores = torch.matmul(by_sequence, key.transpose(0, 1).transpose(-1, -2)).float()
        scores = (scores / softcap).tanh() * softcap
        weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1).to(value.dtype)
        result = torch.matmul(weights, value.transpose(0, 1))
    return result.transpose(0, 1).reshape(num_heads, num_sequences, num_queries, group, head_dim)


def _scatter(output: Tensor, result: Tensor, block: Block) -> None:
    """Writes a block's result [H, S, Q, G, D] to the rows of output [T + 1, Hq, D]; padding goes to the last row."""
    num_heads, num_sequences, num_queries, group, head_dim = result.shape
    by_token = result.permute(1, 2, 0, 3, 4).reshape(num_sequences * num_queries, num_heads * group, head_dim)
    if isinstance(block.tokens, slice):
        output[block.tokens] = by_token
    else:
        output.index_copy_(0, block.tokens, by_token)


def make_plan(segments: list[Segment], num_tokens: int, *, num_query_heads: int, device: torch.device) -> Plan:
    """The plan of a pass over `num_tokens` tokens, of which the first ones are the segments', in order; the rest is padding.

    Segments of one new token come first, sorted by their number of pages, so that blocks of them are slices.
    """
    slots = np.full(num_tokens, DUMMY_PAGE * PAGE_SIZE, dtype=np.int64)
    for segment in segments:
        positions = np.arange(segment.position, segment.position + segment.length)
        pages = np.asarray(segment.pages, dtype=np.int64)
        slots[segment.first : segment.first + segment.length] = pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    num_decodes = next((i for i, segment in enumerate(segments) if segment.length > 1), len(segments))
    blocks = [
        _make_block(segments[start:end], 1, num_tokens, device) for start, end in _decode_ranges(segments[:num_decodes])
    ]
    for group in _prefill_groups(segments[num_decodes:], num_query_heads):
        blocks.append(_make_block(group, round_up_length(max(s.length for s in group)), num_tokens, device))
    num_real = sum(segment.length for segment in segments)
    return Plan(num_real, torch.from_numpy(slots).to(device), blocks)


def round_up_length(length: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: lengths are padded to few sizes, by a third at most."""
    if length <= 4:
        return length
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def _num_pages(segment: Segment) -> int:
    return -(-(segment.position + segment.length) // PAGE_SIZE)


def _decode_ranges(segments: list[Segment]) -> list[tuple[int, int]]:
    """Cuts segments, sorted by pages, into ranges: the fewest pages read plus BLOCK_OVERHEAD a range (dynamic programme)."""
    ends: list[tuple[int, int]] = []
    for index, segment in enumerate(segments):
        size = round_up_length(_num_pages(segment))
        if ends and ends[-1][1] == size:
            ends[-1] = (index + 1, size)
        else:
            ends.append((index + 1, size))
    best: list[tuple[float, int]] = [(0.0, 0)]
    starts = [0] + [end for end, _ in ends]
    for last, (end, size) in enumerate(ends):
        costs = [(best[first][0] + BLOCK_OVERHEAD + (end - starts[first]) * size, first) for first in range(last + 1)]
        best.append(min(costs))
    ranges, last = [], len(ends)
    while last > 0:
        first = best[last][1]
        ranges.append((starts[first], starts[last]))
        last = first
    return ranges[::-1]


def _prefill_groups(segments: list[Segment], num_query_heads: int) -> list[list[Segment]]:
    """Groups of segments of like length and like number of pages, whose scores fit MAX_SCORES; long segments are cut."""
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        num_keys = _num_pages(segment) * PAGE_SIZE
        step = max(1, MAX_SCORES // (num_keys * num_query_heads))
        for start in range(0, segment.length, step):
            length = min(step, segment.length - start)
            part = Segment(segment.first + start, length, segment.position + start, segment.pages)
            groups.setdefault((round_up_length(length), round_up_length(_num_pages(part))), []).append(part)
    limited = []
    for (num_queries, num_pages), group in groups.items():
        count = max(1, MAX_SCORES // (num_queries * num_pages * PAGE_SIZE * num_query_heads))
        limited += [group[start : start + count] for start in range(0, len(group), count)]
    return limited


def _make_block(segments: list[Segment], num_queries: int, num_tokens: int, device: torch.device) -> Block:
    num_pages = max(_num_pages(segment) for segment in segments)
    pages = np.full((len(segments), num_pages), DUMMY_PAGE, dtype=np.int64)
    for i, segment in enumerate(segments):
        count = _num_pages(segment)
        pages[i, :count] = segment.pages[:count]
    first = np.array([segment.first for segment in segments])[:, None]
    length = np.array([segment.length for segment in segments])[:, None]
    offset = np.arange(num_queries)[None]
    positions = np.array([segment.position for segment in segments])[:, None] + np.minimum(offset, length - 1)
    tokens: slice | Tensor
    if num_queries == 1 and segments[-1].first - segments[0].first == len(segments) - 1:
        tokens = slice(segments[0].first, segments[-1].first + 1)
    else:
        tokens = torch.from_numpy(np.where(offset < length, first + offset, num_tokens).reshape(-1)).to(device)
    return Block(
        len(segments),
        num_queries,
        num_pages * PAGE_SIZE,
        tokens,
        torch.from_numpy(pages.reshape(-1)).to(device),
        torch.from_numpy(positions).to(device),
    )
