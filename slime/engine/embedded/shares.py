"""A pass cut into shares that threads compute side by side, each in one thread of its own.

For a small model that is faster than to share every operation among threads: those wait for one another a hundred times
a pass, and ten times as long each time where other processes want the processor too. No sequence looks at another one
within a pass, so a share is a pass like any other.

Legend: T tokens of a pass, B sequences, R rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slime.engine.embedded.plan import Batch

TOKEN_COST = 256
"""What a token costs beside its attention, in tokens attended to; only the balance of shares depends on it."""


@dataclass(frozen=True)
class Share:
    """A part of a batch. rows: its tokens whose logits are wanted; places: which of the whole pass's rows they are."""

    batch: Batch
    rows: list[int]
    places: np.ndarray


def cut(batch: Batch, rows: list[int], count: int) -> list[Share]:
    """A batch in `count` shares of about the same cost, at most one for each sequence; rows as of a pass, [R]."""
    lengths = batch.ends - batch.starts
    share_of = _assign(lengths * (TOKEN_COST + (batch.starts + batch.ends) // 2), count)
    share_of_token = np.repeat(share_of, lengths)
    tokens, wanted = np.array(batch.tokens), np.array(rows, dtype=np.int64)
    number_in_share = np.empty_like(tokens)
    shares = []
    for share in range(min(count, len(lengths))):
        members = np.flatnonzero(share_of == share)
        own = np.flatnonzero(share_of_token == share)
        number_in_share[own] = np.arange(len(own))
        places = np.flatnonzero(share_of_token[wanted] == share)
        part = Batch(
            tokens[own].tolist(), batch.rows[members], batch.starts[members], batch.ends[members], batch.page_table
        )
        shares.append(Share(part, number_in_share[wanted[places]].tolist(), places))
    return shares


def _assign(costs: np.ndarray, count: int) -> np.ndarray:
    """A share for each cost, the largest first, each time the one with the least so far."""
    totals = [0] * count
    share_of = np.empty(len(costs), dtype=np.int64)
    for index in np.argsort(-costs, kind="stable").tolist():
        share = totals.index(min(totals))
        totals[share] += int(costs[index])
        share_of[index] = share
    return share_of
