"""Tensors from the host to a device without a wait for either."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` there; itself where it is there already.

    From the host to a GPU through page-locked memory, so that this process goes on while the GPU still works.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
