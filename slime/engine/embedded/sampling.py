"""Tokens drawn from logits: every row with its own parameters and its own random number.

Legend: B rows, V vocabulary.

A row's random number depends on its seed and on how many tokens it has drawn, on nothing else; a token is found by
inverting the cumulative distribution. So a request draws the same tokens whatever runs beside it, before and after a
preemption. Log-probabilities are those of the temperature-scaled distribution before top-k, top-p and min-p cut it, as
SGLang's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime.engine.embedded.sampling_params import SamplingParams

MAX_ELEMENTS = 1 << 23
"""Rows are sampled in blocks of at most this many logits: 64 MiB of cumulative sums."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: uint64 in, uint64 out, a bijection that scatters neighbours."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64 [B], each a function of its seed and counter (both integer [B]) only."""
    state = mix(seeds.astype(np.uint64) + _GOLDEN) + _GOLDEN * counters.astype(np.uint64)
    return (mix(state) >> np.uint64(11)) * 2.0**-53


def derive_seed(seed: int, index: int) -> int:
    """The seed of the index-th of several streams that one seed stands for; 63 bits."""
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN * np.array([index + 1], dtype=np.uint64)
    return int(mix(state)[0] >> np.uint64(1))


class SamplingTable:
    """Sampling parameters of the running requests, one row each, as arrays."""

    def __init__(self, num_rows: int) -> None:
        self.temperature = np.ones(num_rows, dtype=np.float32)
        self.top_p = np.ones(num_rows, dtype=np.float32)
        self.top_k = np.zeros(num_rows, dtype=np.int64)
        self.min_p = np.zeros(num_rows, dtype=np.float32)
        self.seed = np.zeros(num_rows, dtype=np.uint64)
        self.min_new_tokens = np.zeros(num_rows, dtype=np.int64)
        self.is_greedy = np.zeros(num_rows, dtype=bool)
        self.is_cut = np.zeros(num_rows, dtype=bool)

    def set_row(self, row: int, params: SamplingParams, seed: int) -> None:
        """Makes `row` draw as `params` and `seed` say."""
        greedy = params.is_greedy
        self.temperature[row] = 1.0 if params.temperature < 1e-6 else params.temperature
        self.top_p[row], self.top_k[row], self.min_p[row] = params.top_p, params.top_k, params.min_p
        self.min_new_tokens[row] = params.min_new_tokens
        self.seed[row] = seed & 0xFFFFFFFFFFFFFFFF
        self.is_greedy[row] = greedy
        self.is_cut[row] = not greedy and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)


@dataclass(slots=True)
class Drawn:
    """What one step drew: tokens and their log-probabilities [B], and the distribution's top where asked for."""

    tokens: list[int]
    log_probs: list[float]
    top_log_probs: Tensor | None = None
    top_tokens: Tensor | None = None


def sample(
    logits_BV: Tensor, table: SamplingTable, rows: np.ndarray, counters: np.ndarray, *, num_top: int = 0
) -> Drawn:
    """Draws one token a row of float32 logits [B, V], which are overwritten.

    rows: the table's row of each, int [B]; counters: tokens each has drawn, int [B]; num_top: size of the top that is
    reported.
    """
    block = max(1, MAX_ELEMENTS // logits_BV.shape[1])
    tokens, log_probs, tops = [], [], []
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        scaled = logits_BV[part]
        temperature = table.temperature[rows[part]]
        if (temperature != 1).any():
            scaled.div_(torch.from_numpy(temperature).to(scaled.device)[:, None])
        log_probs_BV = torch.log_softmax(scaled, dim=-1)
        chosen = _choose(log_probs_BV, table, rows[part], counters[part])
        tokens.append(chosen)
        log_probs.append(log_probs_BV.gather(1, chosen[:, None])[:, 0])
        if num_top:
            tops.append(log_probs_BV.topk(min(num_top, log_probs_BV.shape[1]), dim=-1))
    drawn = Drawn(torch.cat(tokens).tolist(), torch.cat(log_probs).tolist())
    if num_top:
        drawn.top_log_probs = torch.cat([top.values for top in tops]).cpu()
        drawn.top_tokens = torch.cat([top.indices for top in tops]).cpu()
    return drawn


def _choose(log_probs_BV: Tensor, table: SamplingTable, rows: np.ndarray, counters: np.ndarray) -> Tensor:
    greedy, cut = table.is_greedy[rows], table.is_cut[rows]
    if greedy.all():
        return log_probs_BV.argmax(dim=-1)
    points = torch.from_numpy(uniform(table.seed[rows], counters)).to(log_probs_BV.device)
    chosen = _invert(log_probs_BV.exp(), points)
    if cut.any():
        where = torch.from_numpy(np.flatnonzero(cut)).to(chosen.device)
        chosen[where] = _choose_cut(log_probs_BV[where].exp(), points[where], table, rows[cut])
    if greedy.any():
        where = torch.from_numpy(np.flatnonzero(greedy)).to(chosen.device)
        chosen[where] = log_probs_BV[where].argmax(dim=-1)
    return chosen


def _invert(weights_BV: Tensor, points_B: Tensor) -> Tensor:
    """The first index at which the cumulative sum of the weights passes the point's share of their total."""
    cumulative = weights_BV.cumsum(dim=-1, dtype=torch.float64)
    index = torch.searchsorted(cumulative, (points_B * cumulative[:, -1])[:, None], right=True)[:, 0]
    return index.clamp_(max=weights_BV.shape[1] - 1)


def _choose_cut(probs_BV: Tensor, points_B: Tensor, table: SamplingTable, rows: np.ndarray) -> Tensor:
    """As `_invert`, among the top_k likeliest, of these the fewest that reach top_p, at least min_p of the best."""
    sorted_probs, order = probs_BV.sort(dim=-1, descending=True, stable=True)
    columns = {
        name: torch.from_numpy(values[rows]).to(probs_BV.device)[:, None]
        for name, values in (("top_p", table.top_p), ("top_k", table.top_k), ("min_p", table.min_p))
    }
    before = sorted_probs.cumsum(dim=-1) - sorted_probs
    rank = torch.arange(probs_BV.shape[1], device=probs_BV.device)
    dropped = before > columns["top_p"]
    dropped |= (rank >= columns["top_k"]) & (columns["top_k"] > 0)
    dropped |= sorted_probs < columns["min_p"] * sorted_probs[:, :1]
    picked = _invert(sorted_probs.masked_fill_(dropped, 0.0), points_B)
    return order.gather(1, picked[:, None])[:, 0]
