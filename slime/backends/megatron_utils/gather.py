"""Full tensors under Hugging Face names from the shards of all ranks, bucket by bucket."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.backends.megatron_utils.model import Chunk, Weights
from slime.backends.megatron_utils.names import ModelShape, ParallelPlace, hf_tensors, map_parameter
from slime.training.backend import NamedTensor


class Entry(NamedTuple):
    """One parameter as the ranks of a pipeline stage hold it, of the same size on each."""

    name: str
    place: ParallelPlace
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_expert(self) -> bool:
        """Whether it is one of the experts that are shared among ranks."""
        return ".experts." in self.name

    @property
    def numel(self) -> int:
        """Of the shard."""
        return math.prod(self.shape)


def gathered_tensors(chunk: Chunk, shape: ModelShape, *, bucket_bytes: int) -> Iterator[NamedTensor]:
    """Every tensor of the model on every rank, about `bucket_bytes` (or one parameter) at a time. A collective."""
    own = chunk.weights()
    for stage, entries in enumerate(_entries_by_stage(chunk)):
        for bucket in _buckets(entries, bucket_bytes):
            yield from _unpacked(bucket, _gathered(bucket, own, stage), shape)


def _entries_by_stage(chunk: Chunk) -> list[list[Entry]]:
    """What each pipeline stage holds, in order; where it stands among tensor-parallel ranks is this rank's."""
    place = chunk.place
    mine = [Entry(name, place, tuple(tensor.shape), tensor.dtype) for name, tensor in chunk.weights().items()]
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return [mine]
    stages: list[list[Entry]] = [[] for _ in range(group.size())]
    dist.all_gather_object(stages, mine, group=group)
    return stages


def _buckets(entries: list[Entry], bucket_bytes: int) -> Iterator[list[Entry]]:
    """Neighbours of one kind and dtype; small enough that all shards of a bucket fit `bucket_bytes`."""
    for (is_expert, _), members in groupby(entries, key=lambda entry: (entry.is_expert, entry.dtype)):
        limit = bucket_bytes // _group(is_expert=is_expert).size()
        bucket: list[Entry] = []
        size = 0
        for entry in members:
            num_bytes = entry.numel * entry.dtype.itemsize
            if bucket and size + num_bytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(entry)
            size += num_bytes
        yield bucket


def _group(*, is_expert: bool) -> dist.ProcessGroup:
    """The ranks of one stage that together hold a parameter, or the experts of one number."""
    if is_expert:
        return parallel_state.get_expert_tensor_and_model_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _gathered(bucket: list[Entry], own: Weights, stage: int) -> list[Tensor]:
    """[numel] of each rank of the bucket's group, on every stage."""
    stages = parallel_state.get_pipeline_model_parallel_group()
    if stages.rank() == stage:
        flat = torch.cat([own[entry.name].detach().reshape(-1) for entry in bucket])
    else:
        numel = sum(entry.numel for entry in bucket)
        flat = torch.empty(numel, dtype=bucket[0].dtype, device=torch.cuda.current_device())
    if stages.size() > 1:
        dist.broadcast(flat, src=dist.get_global_rank(stages, stage), group=stages)
    group = _group(is_expert=bucket[0].is_expert)
    if group.size() == 1:
        return [flat]
    shares = [torch.empty_like(flat) for _ in range(group.size())]
    dist.all_gather(shares, flat, group=group)
    return shares


def _unpacked(bucket: list[Entry], shares: list[Tensor], shape: ModelShape) -> Iterator[NamedTensor]:
    offset = 0
    for entry in bucket:
        numel = entry.numel
        shards = [share[offset : offset + numel].view(entry.shape) for share in shares]
        offset += numel
        for place, members in _by_place(entry, shards):
            mapped = map_parameter(shape, place, entry.name)
            for name, tensor in hf_tensors(mapped, members[: mapped.num_shards]):
                yield NamedTensor(name, tensor)


def _by_place(entry: Entry, shards: list[Tensor]) -> Iterator[tuple[ParallelPlace, list[Tensor]]]:
    """The shards of a parameter; of experts, those of each expert-parallel rank: they are different experts."""
    if not entry.is_expert:
        yield entry.place, shards
        return
    size = entry.place.etp_size
    for ep_rank in range(entry.place.ep_size):
        yield replace(entry.place, ep_rank=ep_rank), shards[ep_rank * size : (ep_rank + 1) * size]
