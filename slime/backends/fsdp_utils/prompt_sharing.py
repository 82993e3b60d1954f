"""Prompts that several samples of a pack share go through the model once.

Under causal attention what a model computes for a prompt does not depend on the response, so the samples of one group
have the same activations there. They are computed once and read by each; the gradients of all add up in them.

A worked example, two responses a and b to the prompt p, and c to q (N = 9 packed tokens, U = 7 unique ones):

    input_ids = [p0 p1 a0 a1 | p0 p1 b0 | q0 c0]
    first     = [ 0  1  2  3           6    7  8]      packed positions that are computed, [U]
    place     = [ 0  1  2  3    0  1   4    5  6]      where each packed token's activations are, [N]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slime.data.packed import PackedBatch


class Sharing(NamedTuple):
    """Which tokens of a pack are computed, and where each token finds its activations. See the example above."""

    first: Tensor  # int64 [U]: ascending, or rank by rank where several ranks compute them
    place: Tensor  # int64 [N] in [0, U)


def shared_prompts(batch: PackedBatch) -> Sharing | None:
    """How the sequences of `batch` share their prompts; None where no two prompts are equal."""
    lengths = np.asarray(batch.sequence_lengths)
    responses = np.bincount(batch.sequence_ids.cpu().numpy(), minlength=len(lengths))
    starts = np.cumsum(lengths) - lengths
    tokens = batch.input_ids.cpu().numpy()
    source = np.arange(len(tokens))  # the packed position that computes each token
    seen: dict[bytes, int] = {}
    for start, size in zip(starts, lengths - responses, strict=True):
        owner = seen.setdefault(tokens[start : start + size].tobytes(), start)
        source[start : start + size] = np.arange(owner, owner + size)
    is_first = source == np.arange(len(tokens))
    if is_first.all():
        return None
    place = (np.cumsum(is_first) - 1)[source]
    device = batch.input_ids.device
    return Sharing(torch.from_numpy(np.flatnonzero(is_first)).to(device), torch.from_numpy(place).to(device))
