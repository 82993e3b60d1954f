"""How a Megatron tensor is made of Hugging Face tensors: as a list of slices laid end to end along one axis.

One list serves every direction: reading a rank's share out of files, joining ranks' shares, and splitting them again.
Worked example, 4 query heads in 2 groups of size d, q [4d, h], k and v [2d, h]: `linear_qkv.weight` [8d, h] is
q[0:2d], k[0:d], v[0:d], q[2d:4d], k[d:2d], v[d:2d]; rank 0 of 2 holds the first three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows `start:stop`, along the layout's axis, of the HF tensor number `source`; PADDING stands for zeros."""

    source: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Rows that it fills."""
        return self.stop - self.start


PADDING = -1


@dataclass(frozen=True)
class Layout:
    """pieces(lengths, rank, size): what rank `rank` of `size` holds, given the HF tensors' lengths along `axis`."""

    pieces: Callable[[Sequence[int], int, int], list[Piece]]
    axis: int = 0
    is_sharded: bool = True


def _whole(lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
    (length,) = lengths
    return [Piece(0, 0, length)]


def _even(lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
    """Equal parts of the tensor, or of each of several tensors (gate, then up)."""
    pieces = []
    for source, length in enumerate(lengths):
        assert length % size == 0, f"an axis of {length} cannot be split among {size} ranks"
        part = length // size
        pieces.append(Piece(source, rank * part, (rank + 1) * part))
    return pieces


def _even_halves(lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
    """Gate and up in one tensor: the rank's part of the first half, then of the second."""
    half = lengths[0] // 2
    (piece,) = _even([half], rank, size)
    return [piece, Piece(0, half + piece.start, half + piece.stop)]


REPLICATED = Layout(_whole, is_sharded=False)
COLUMN = Layout(_even)
ROW = Layout(_even, axis=1)
GATE_UP = Layout(_even)
FUSED_GATE_UP = Layout(_even_halves)


def qkv(num_groups: int) -> Layout:
    """Queries, keys and values, group by group; with more ranks than groups a rank holds part of a group."""

    def pieces(lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
        parts = [length // num_groups for length in lengths]
        whole = [
            Piece(source, group * part, (group + 1) * part)
            for group in range(num_groups)
            for source, part in enumerate(parts)
        ]
        length = sum(lengths) // size
        assert length * size == sum(lengths), f"{sum(lengths)} rows of linear_qkv cannot be split among {size} ranks"
        return _restrict(whole, rank * length, (rank + 1) * length)

    return Layout(pieces)


def vocabulary(padded_size: int) -> Layout:
    """Rows of the vocabulary, and zeros up to `padded_size`."""

    def pieces(lengths: Sequence[int], rank: int, size: int) -> list[Piece]:
        whole = [Piece(0, 0, lengths[0]), Piece(PADDING, lengths[0], padded_size)]
        part = padded_size // size
        assert part * size == padded_size, f"a vocabulary of {padded_size} cannot be split among {size} ranks"
        return _restrict(whole, rank * part, (rank + 1) * part)

    return Layout(pieces)


def _restrict(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """What lies in rows `start:stop` of the tensor that the pieces make."""
    found, offset = [], 0
    for source, first, last in pieces:
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            found.append(Piece(source, first + low - offset, first + high - offset))
        offset += last - first
    return found
