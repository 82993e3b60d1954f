"""Keys and values of all tokens that requests and the prefix cache still need, in pages of one pool.

Legend: L layers, H key-value heads, D head dimension, P page size, N pages.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor

PAGE_SIZE = 32
"""Tokens in a page. Lengths padded to whole pages are whole vectors of every CPU, which exactness rests on.

A CPU reads scattered pages of 32 almost twice as fast as of 16, and of 64 no faster.
"""

DUMMY_PAGE = 0
"""Never handed out: padding tokens write here."""


class OutOfPages(Exception):
    """The pool has too few free pages."""


class KVCache:
    """A pool of reference-counted pages; the tensors live while memory is not released."""

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        *,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = -(-num_tokens // PAGE_SIZE) + 1
        self._shape = (num_layers, 2, num_heads, self.num_pages, PAGE_SIZE, head_dim)
        self._dtype, self._device = dtype, device
        self._pool: Tensor | None = None
        self._layers: tuple[Tensor, ...] = ()
        self._references = np.zeros(self.num_pages, dtype=np.int32)
        self._free = list(
            range(DUMMY_PAGE + 1, self.num_pages)
        )  # a heap: neighbours are read faster than scattered pages
        self._highest_used = 0
        self.allocate_memory()

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return (self.num_pages - 1) * PAGE_SIZE

    @property
    def num_free_pages(self) -> int:
        """Pages that nothing refers to."""
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole pool."""
        return int(np.prod(self._shape)) * self._dtype.itemsize

    @property
    def has_memory(self) -> bool:
        """Whether the pool's tensors exist."""
        return self._pool is not None

    def allocate_memory(self) -> None:
        """Makes the pool's tensors, zeroed: a stale NaN in padding would poison what attends to it with weight 0."""
        self._pool = _lazy_zeros(self._shape, self._dtype, self._device)
        self._layers = self._pool.unbind(0)
        self._highest_used = 0

    def release_memory(self) -> None:
        """Frees the pool's tensors; only when no page is in use."""
        assert self.num_free_pages == self.num_pages - 1, (
            f"{self.num_pages - 1 - self.num_free_pages} pages still in use"
        )
        self._pool, self._layers = None, ()

    def layer(self, layer: int) -> Tensor:
        """The keys and values of one layer, [2, H, N, P, D]."""
        return self._layers[layer]

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each. Raises OutOfPages and takes none where fewer are free."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages wanted, {len(self._free)} free")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._references[page] = 1
            self._highest_used = max(self._highest_used, page)
        return pages

    def share(self, pages: list[int]) -> None:
        """Adds a reference to each page."""
        for page in pages:
            self._references[page] += 1

    def free(self, pages: list[int]) -> None:
        """Drops a reference of each page; a page without any is free."""
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                heapq.heappush(self._free, page)

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copies the keys and values of pages, in all layers."""
        for layer in self._layers:
            layer[:, :, targets] = layer[:, :, sources]

    def clear(self) -> None:
        """Zeroes what was ever written, so that a NaN of broken weights does not outlive them."""
        if self._pool is not None:
            self._pool[:, :, :, : self._highest_used + 1] = 0
        self._highest_used = 0


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the system provides the memory only as it is written (torch.zeros writes all of it at once)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
