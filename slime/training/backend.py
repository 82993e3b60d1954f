"""The seam between the update rule and a training library.

Shapes: T response tokens of one micro-batch, S its sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from slime.algorithms.reduce import SequenceSum
from slime.data.packed import PackedBatch

ModelTag = Literal["actor", "ref", "old_actor", "teacher", "critic"]
POLICY: tuple[ModelTag, ...] = ("actor", "old_actor")  # whose choice of experts is kept for the update


class NamedTensor(NamedTuple):
    """A full tensor under its Hugging Face name."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class ParallelLayout:
    """Where this process stands. Ranks with one `data_rank` work on the same samples.

    context_size: ranks that share the tokens of a sequence; together they hold that many times `max_tokens_per_gpu`.
    micro_batches_multiple_of: what the number of micro-batches of a step must be a multiple of (pipeline schedules).
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    context_size: int = 1
    micro_batches_multiple_of: int = 1

    @property
    def is_reporter(self) -> bool:
        """One process of the world reports metrics and talks to engines."""
        return self.rank == 0


@dataclass
class TokenOutputs:
    """What a forward says of the response tokens that this rank holds; gradients flow through all of it."""

    log_probs: Tensor  # float32 [T], of the distribution at the rollout temperature; zeros where there are none
    entropy: Tensor | None = None  # float32 [T], of the same distribution
    values: Tensor | None = None  # float32 [T], a critic's: what it expected before each response token
    logits: Tensor | None = None  # float32 [T, V], of the same distribution; only for losses that ask for it


class Wants(NamedTuple):
    """What a loss reads besides log-probs (or values)."""

    entropy: bool = False
    logits: bool = False  # the full [T, V]: memory that grows with the vocabulary


class LossOutput(NamedTuple):
    """loss: scalar. metrics: scalars without gradient, `train/NAME`; a backend adds the loss itself as `loss`.

    All are this micro-batch's share: shares of a step add up to its mean.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class LossFn(Protocol):
    """The loss of one micro-batch. It sees per-token values only: no logits, no model, no process group."""

    def __call__(self, outputs: TokenOutputs, batch: PackedBatch, sequence_sum: SequenceSum) -> LossOutput: ...


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, summed over micro-batches and ranks."""

    metrics: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool  # the loss or the gradient was not finite; nothing was updated
    loss_scale: float | None = None  # of float16, as this step used it
    overflowed: bool = False  # skipped because of that scale, which is smaller now: nothing to worry about


class TrainBackend(Protocol):
    """One process's share of a trainable model: parameters, optimizer, parallel groups, micro-batches, checkpoints.

    Every process of the world makes the same calls in the same order. It knows nothing of the algorithm.
    """

    layout: ParallelLayout

    def load(self) -> int:
        """Load what the settings name. Returns the first rollout id to run."""
        ...

    def log_probs(self, batches: list[PackedBatch], model: ModelTag, *, entropy: bool) -> list[TokenOutputs]:
        """Outputs of each micro-batch under the weights `model`, without gradients.

        Complete on every rank, [T] in the order of `target_index`, however the model is split. The policy, with
        --use-routing-replay, follows the experts of `routed_experts`; this rank's that are not there are written there.
        """
        ...

    def train_step(self, batches: list[PackedBatch], loss: LossFn, *, wants: Wants) -> StepMetrics:
        """One optimizer step over all micro-batches, with the experts of their `routed_experts`, if any.

        A backend that splits sequences among ranks completes the outputs on each, so that every loss and hook sees
        whole samples, and each rank takes the gradient of its own tokens. Or it hands the loss this rank's tokens,
        outputs and [T] fields of the micro-batch alike, and completes `sequence_sum` with the other ranks' share.
        """
        ...

    def sum_over_data_ranks(self, values: Tensor) -> Tensor:
        """`values` added over data-parallel ranks, the same on each; for small tensors."""
        ...

    def copy_weights(self, source: ModelTag, target: ModelTag) -> None:
        """Make `target`, a model without an optimizer, equal to `source`; it is made where there is none."""
        ...

    def hf_tensors(self) -> Iterator[NamedTensor]:
        """Full tensors under Hugging Face names, gathered bucket by bucket; every rank iterates to the end."""
        ...

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint that is complete or absent, or begin to: with --async-save, from the state of now."""
        ...

    def finish_save(self) -> None:
        """Wait for a checkpoint that is still being written; raises what went wrong with it."""
        ...

    def sleep(self) -> None:
        """Give device memory to the engines."""
        ...

    def wake_up(self) -> None:
        """Take it back, with the same state."""
        ...
