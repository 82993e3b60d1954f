"""Which rank trains on which samples, in which micro-batches. Pure functions of lengths: every rank computes the same.

A step's samples are shared among data-parallel ranks, then packed into micro-batches, as many on each rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Sequence length at which attention's quadratic work equals the linear work of a 4096-wide transformer (6 x width).
ATTENTION_CROSSOVER = 24_576


@dataclass(frozen=True)
class PackingLimit:
    """How much one micro-batch holds: `max_tokens` where given, else `max_samples`."""

    max_samples: int = 1
    max_tokens: int | None = None

    def admits(self, num_samples: int, num_tokens: int) -> bool:
        """Whether this many samples and tokens fit; a single sample always does."""
        if num_samples == 1:
            return True
        return num_tokens <= self.max_tokens if self.max_tokens is not None else num_samples <= self.max_samples


def split_steps(num_samples: int, num_steps: int) -> list[NDArray[np.int64]]:
    """Rows of each optimizer step: consecutive, all used, sizes that differ by at most one."""
    return np.array_split(np.arange(num_samples), max(1, min(num_steps, num_samples)))


def sequence_costs(lengths: NDArray[np.int32]) -> NDArray[np.float64]:
    """Work of a forward and backward over each sequence, in tokens; the quadratic part of attention included."""
    lengths = lengths.astype(np.float64)
    return lengths * (1 + lengths / ATTENTION_CROSSOVER)


def share_among_ranks(costs: Sequence[float], num_ranks: int, *, balance: bool) -> list[list[int]]:
    """Rows of each rank: dealt in turn, or heaviest first to the rank with the least work so far. No rank stays empty
    while there are as many rows as ranks."""
    if not balance:
        return [list(range(rank, len(costs), num_ranks)) for rank in range(num_ranks)]
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, 0, rank) for rank in range(num_ranks)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        load, count, rank = heapq.heappop(loads)
        shares[rank].append(row)
        heapq.heappush(loads, (load + costs[row], count + 1, rank))
    return [sorted(share) for share in shares]


def pack(lengths: Sequence[int], limit: PackingLimit) -> list[list[int]]:
    """Micro-batches of rows: first fit, longest first. A sample longer than the limit gets one of its own."""
    bins: list[list[int]] = []
    tokens: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        for index, members in enumerate(bins):
            if limit.admits(len(members) + 1, tokens[index] + lengths[row]):
                members.append(row)
                tokens[index] += lengths[row]
                break
        else:
            bins.append([row])
            tokens.append(lengths[row])
    return bins


def split_into(bins: list[list[int]], count: int, lengths: Sequence[int]) -> list[list[int]]:
    """The same rows in `count` bins, at least as many as now: the heaviest is halved, else an empty one added."""
    bins = [list(members) for members in bins]
    while len(bins) < count:
        divisible = [index for index, members in enumerate(bins) if len(members) > 1]
        if not divisible:
            bins.append([])
            continue
        heaviest = max(divisible, key=lambda index: sum(lengths[row] for row in bins[index]))
        members = bins[heaviest]
        bins[heaviest], rest = members[::2], members[1::2]
        bins.append(rest)
    return bins


def plan_step(
    lengths: NDArray[np.int32],
    rank: int,
    num_ranks: int,
    *,
    limit: PackingLimit,
    balance: bool,
    multiple_of: int = 1,
) -> list[list[int]]:
    """Micro-batches of one rank for one step, as rows of `lengths`; every rank gets the same number of them.

    Their number is a multiple of `multiple_of`. A rank with fewer samples than micro-batches gets empty ones.
    """
    shares = share_among_ranks(sequence_costs(lengths).tolist(), num_ranks, balance=balance)
    sizes = lengths.tolist()
    plans = [[[share[i] for i in members] for members in pack([sizes[r] for r in share], limit)] for share in shares]
    count = -(-max(map(len, plans)) // multiple_of) * multiple_of
    return split_into(plans[rank], count, sizes)
