"""Micro-batches through this rank's stages, forward and backward, by Megatron's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from slime.backends.megatron_utils.head import TokenHead, ValueHead
from slime.backends.megatron_utils.packing import Inputs, Split, inputs_of
from slime.backends.megatron_utils.parallel import (
    SumOverContext,
    from_last_stage,
    is_last_stage,
    over_context,
    tensor_from_last_stage,
)
from slime.backends.megatron_utils.rotary import rotation_of
from slime.backends.megatron_utils.routers import following
from slime.backends.shared.routing_replay import RoutingReplay
from slime.data.packed import PackedBatch
from slime.training.backend import LossFn, TokenOutputs, Wants


class Passes:
    """Of one model. stages: wrapped. head: where this rank ends the pipeline. replays: one of each stage, or none."""

    def __init__(
        self,
        stages: list[nn.Module],
        split: Split,
        device: torch.device,
        *,
        head: TokenHead | ValueHead | None,
        is_critic: bool,
        replays: Sequence[RoutingReplay],
        lengths_on_device: bool,
    ) -> None:
        self.stages = stages
        self.split = split
        self.device = device
        self.head = head
        self.is_critic = is_critic
        self.replays = replays
        self.lengths_on_device = lengths_on_device

    def outputs(self, batches: list[PackedBatch], *, entropy: bool, replayed: bool) -> list[TokenOutputs]:
        """Of every micro-batch, whole, on every rank. replayed: routers go where they went, if they are replayed."""
        for stage in self.stages:
            stage.eval()
        with torch.no_grad():
            replays = self.replays if replayed else []
            found = self._run(batches, Wants(entropy=entropy), _outputs_of, forward_only=True, replays=replays)
        for stage in self.stages:
            stage.train()
        return self._complete(batches, found, entropy=entropy)

    def gradients(self, batches: list[PackedBatch], loss: LossFn, *, wants: Wants) -> dict[str, float]:
        """Add those of the summed loss to the stages' buffers. Returns its metrics, the same on every rank."""
        finish = partial(_loss_of, loss=loss)
        return _sum_metrics(self._run(batches, wants, finish, forward_only=False, replays=self.replays))

    def _run(
        self,
        batches: list[PackedBatch],
        wants: Wants,
        finish: Callable[..., Any],
        *,
        forward_only: bool,
        replays: Sequence[RoutingReplay | None],
    ) -> list[Any]:
        """What `finish` left of each micro-batch, on the last stage alone."""
        inputs = [inputs_of(batch, self.split, self.device, on_device=self.lengths_on_device) for batch in batches]
        of_stage = dict(zip(self.stages, replays or [None] * len(self.stages), strict=True))
        follow = partial(following, of_stage, device=self.device, is_trained=not forward_only)
        result: list[Any] = get_forward_backward_func()(
            forward_step_func=partial(self._forward, wants=wants, finish=finish, follow=follow),
            data_iterator=[iter(inputs) for _ in self.stages],
            model=self.stages,
            num_microbatches=len(batches),
            seq_length=1,  # stages tell each other how long theirs are
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return result if is_last_stage() else []

    def _forward(
        self,
        iterator: Iterator[Inputs],
        stage: nn.Module,
        *,
        wants: Wants,
        finish: Callable[..., Any],
        follow: Callable[[nn.Module, Inputs], AbstractContextManager[None]],
    ) -> tuple[Tensor, Callable[..., Any]]:
        """One micro-batch through one stage, as a schedule calls it."""
        inputs = next(iterator)
        inputs.packing.rotation = rotation_of(unwrap_model(stage), inputs.position_ids[0], inputs.packing.max_seqlen_q)
        head = self.head if stage is self.stages[-1] else None
        if head is not None:
            head.wanted = (inputs, wants)
        with follow(stage, inputs):
            output = stage(inputs.input_ids, inputs.position_ids, None, packed_seq_params=inputs.packing)
        return output, lambda output, **options: finish(inputs, head.take() if head is not None else None)

    def _complete(
        self, batches: list[PackedBatch], found: list[tuple[Inputs, TokenOutputs]], *, entropy: bool
    ) -> list[TokenOutputs]:
        """What the last stage and the context-parallel ranks found, put together on every rank."""
        lengths = [len(batch.target_index) for batch in batches]
        all_T = torch.zeros(1 + entropy, sum(lengths), device=self.device)
        for part_T, (inputs, outputs) in zip(all_T.split(lengths, dim=1), found, strict=False):
            part_T[0, inputs.kept] = outputs.log_probs if outputs.values is None else outputs.values
            if outputs.entropy is not None:
                part_T[1, inputs.kept] = outputs.entropy
        tensor_from_last_stage(over_context(all_T))
        parts = [part_T.clone() for part_T in all_T.split(lengths, dim=1)]
        if self.is_critic:
            return [TokenOutputs(torch.zeros_like(part_T[0]), values=part_T[0]) for part_T in parts]
        return [TokenOutputs(part_T[0], entropy=part_T[1] if entropy else None) for part_T in parts]


def _outputs_of(inputs: Inputs, outputs: TokenOutputs) -> tuple[Inputs, TokenOutputs]:
    return inputs, outputs


def _loss_of(inputs: Inputs, outputs: TokenOutputs, *, loss: LossFn) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As Megatron wants it: the loss, a number of tokens that nothing is divided by, and metrics."""
    result = loss(outputs, inputs.batch, partial(_sequence_sum, batch=inputs.batch))
    return result.loss, torch.tensor(1, dtype=torch.int), result.metrics | {"loss": result.loss.detach()}


def _sequence_sum(values_T: Tensor, batch: PackedBatch) -> Tensor:
    own = values_T.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, values_T)
    summed: Tensor = SumOverContext.apply(own)
    return summed


def _sum_metrics(found: list[dict[str, Tensor]]) -> dict[str, float]:
    """Shares of micro-batches, context-parallel and data-parallel ranks, added up; the same on every rank."""
    metrics: dict[str, float] = {}
    if is_last_stage():
        names = list(found[0])
        shares = torch.stack([torch.stack([share[name] for name in names]) for share in found]).sum(0)
        dist.all_reduce(shares, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        metrics = dict(zip(names, shares.tolist(), strict=True))
    summed: dict[str, float] = from_last_stage(metrics)
    return summed


def add_up_gradients(stages: list[nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Among ranks, as a schedule's end. They are shares of a mean already: nothing is divided by `num_tokens`."""
    finalize_model_grads(stages, None, **options)
