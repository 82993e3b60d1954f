"""The process groups of a rank, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.megatron_utils.names import ParallelPlace
from slime.backends.megatron_utils.stages import micro_batch_group
from slime.config.run import RunConfig
from slime.training.backend import ParallelLayout


def open_groups(cfg: MegatronConfig, run: RunConfig, *, num_virtual: int = 1) -> ParallelLayout:
    """Make Megatron's process groups on the world of `torch.distributed`; those of an earlier model go.

    num_virtual: stages of each pipeline rank.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=cfg.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_virtual if num_virtual > 1 else None,
        context_parallel_size=run.context_parallel_size,
        expert_model_parallel_size=cfg.expert_model_parallel_size,
        expert_tensor_parallel_size=cfg.expert_tensor_parallel_size or cfg.tensor_model_parallel_size,
        distributed_timeout_minutes=run.distributed_timeout_minutes,
    )
    model_parallel_cuda_manual_seed(run.seed)
    return ParallelLayout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        context_size=run.context_parallel_size,
        micro_batches_multiple_of=micro_batch_group(cfg, num_virtual),
    )


def place_of(layers: Sequence[int], padded_vocab_size: int) -> ParallelPlace:
    """Where the layers that this rank names stand."""
    return ParallelPlace(
        layers=layers,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        padded_vocab_size=padded_vocab_size,
    )


def is_last_stage() -> bool:
    """Whether this rank ends the pipeline."""
    return bool(parallel_state.is_pipeline_last_stage())


def from_last_stage(value: Any) -> Any:
    """What the last stage says, on every stage; of the others nothing is read."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return box[0]


def tensor_from_last_stage(tensor: Tensor) -> Tensor:
    """The same for a tensor whose shape all stages know, in place."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return tensor


def over_context(tensor: Tensor) -> Tensor:
    """Added up over context-parallel ranks, in place, without gradient."""
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


class SumOverContext(torch.autograd.Function):
    """Added up over context-parallel ranks; every rank's loss reads the sum, so gradients are added up too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """values: of any shape, the same on every rank."""
        return over_context(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Of the sum."""
        return over_context(gradients[0].clone())
