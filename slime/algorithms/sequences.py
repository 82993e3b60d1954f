"""Sums and means over the trained tokens of a sequence, for losses. Shapes: T response tokens, S sequences.

Parallelism enters here and nowhere else: `sequence_sum` adds what other context-parallel ranks hold of a sequence.
No loss needs a gradient through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime.algorithms.reduce import SequenceSum


@dataclass(frozen=True)
class Sequences:
    """Which tokens of a micro-batch are trained, and whose they are.

    Two sequences, of three and two tokens, the second token a tool's: mask_T = [1 0 1 | 1 1] and
    sequence_ids_T = [0 0 0 | 1 1].
    """

    mask_T: Tensor  # float [T] of 0 and 1
    sequence_ids_T: Tensor  # int64 [T] in [0, S)
    sequence_sum: SequenceSum  # [T] -> [S]

    def trained(self, values_T: Tensor) -> Tensor:
        """[T] values at trained tokens, 0 at masked ones whatever stood there; so it is in the gradient."""
        return torch.where(self.mask_T != 0, values_T, 0.0)

    def total(self, values_T: Tensor) -> Tensor:
        """[T] at each token, the sum of `values_T` over the trained tokens of its sequence. Without gradient."""
        return self.sequence_sum(self.trained(values_T.detach()))[self.sequence_ids_T]

    def mean(self, values_T: Tensor) -> Tensor:
        """[T] at each token, the mean of `values_T` over the trained tokens of its sequence; 0 if it has none."""
        return self.total(values_T) / self.total(torch.ones_like(values_T)).clamp(min=1)
