"""Named tensors laid end to end in buckets of bytes: few large messages instead of hundreds of small ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its bucket, in bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    end: int


@dataclass(frozen=True)
class Bucket:
    """data: uint8 [bytes], on the tensors' device."""

    data: Tensor
    places: list[Place]
    is_last: bool


def in_buckets(tensors: Iterable[tuple[str, Tensor]], num_bytes: int) -> Iterator[Bucket]:
    """The tensors in order, in buckets of at most `num_bytes`, or of one tensor that is larger."""
    held: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > num_bytes:
            yield _bucket(held, is_last=False)
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield _bucket(held, is_last=True)


def _bucket(tensors: list[tuple[str, Tensor]], *, is_last: bool) -> Bucket:
    """Wider types come first, so that each tensor begins at a multiple of its element size."""
    places, parts, start = [], [], 0
    for name, tensor in sorted(tensors, key=lambda pair: -pair[1].dtype.itemsize):
        places.append(Place(name, tensor.shape, tensor.dtype, start, start + tensor.nbytes))
        parts.append(tensor.contiguous().view(-1).view(torch.uint8))
        start += tensor.nbytes
    return Bucket(torch.cat(parts), places, is_last)
