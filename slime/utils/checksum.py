"""A checksum of a tensor that is the same on every device, for comparing weights on two sides of a transfer."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WORDS_PER_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def tensor_checksum(tensor: Tensor) -> str:
    """24 hexadecimal digits that depend on the tensor's type, shape and bytes, not on its device or strides.

    Each 8-byte word is mixed with its place and the results are added modulo 2**64, so the order of the additions does
    not matter and two words that change places are noticed. It guards against mistakes, not against forgery.
    """
    import torch

    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    tail = torch.nn.functional.pad(data[whole:], (0, 8)).clone()[:8].view(torch.int64)
    body = data[:whole]
    if body.data_ptr() % 8:
        body = body.clone()
    words = body.view(torch.int64)
    size = _WORDS_PER_CHUNK.get(data.device.type, 1 << 20)
    places = torch.arange(min(size, max(len(words), 1)), device=data.device) * _STEP
    total = _mixed(tail, places[:1] + whole)
    for start in range(0, len(words), size):
        chunk = words[start : start + size]
        total += _mixed(chunk, places[: len(chunk)] + _signed(start * _STEP))
    kind = f"{tensor.dtype} {tuple(tensor.shape)}"
    return f"{zlib.crc32(kind.encode()):08x}{int(total.item()) % (1 << 64):016x}"


def _signed(number: int) -> int:
    """`number` as a 64-bit integer holds it, so that places do not depend on where chunks begin."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _mixed(words: Tensor, places: Tensor) -> Tensor:
    mixed = words + places
    mixed ^= mixed >> 32
    mixed *= _FIRST
    mixed ^= mixed >> 29
    mixed *= _SECOND
    mixed ^= mixed >> 32
    return mixed.sum()
