"""A sharded transformers model as full tensors under the names and layouts of its Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from slime.backends.shared.export import exported_dtype
from slime.training.backend import NamedTensor


def hf_named_tensors(lm: PreTrainedModel, *, dtype: torch.dtype, bucket_bytes: int) -> Iterator[NamedTensor]:
    """Gather every parameter in turn, as `dtype`, about `bucket_bytes` (or one tensor) at a time.

    A collective. Tensors that transformers fuses in memory, such as experts, are split as checkpoints hold them.
    """
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in _own_tensors(lm):
        bucket[name] = _full(tensor)
        if tensor.is_floating_point():
            bucket[name] = bucket[name].to(exported_dtype(name, dtype))
        size += bucket[name].nbytes
        if size >= bucket_bytes:
            yield from _under_checkpoint_names(lm, bucket)
            bucket, size = {}, 0
    yield from _under_checkpoint_names(lm, bucket)


def _own_tensors(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, without second names of tied weights."""
    persistent = lm.state_dict().keys()
    for name, parameter in lm.named_parameters():
        yield name, parameter.detach()
    for name, buffer in lm.named_buffers():
        if name in persistent:
            yield name, buffer


def _full(tensor: Tensor) -> Tensor:
    """Gathered on the device of its mesh, also where the shards lie on the host."""
    if not isinstance(tensor, DTensor):
        return tensor
    device = tensor.device_mesh.device_type
    return tensor.full_tensor() if tensor.device.type == device else cast(DTensor, tensor.to(device)).full_tensor()


def _under_checkpoint_names(lm: PreTrainedModel, bucket: dict[str, Tensor]) -> Iterator[NamedTensor]:
    for name, tensor in revert_weight_conversion(lm, bucket).items():
        yield NamedTensor(name, tensor.contiguous())
