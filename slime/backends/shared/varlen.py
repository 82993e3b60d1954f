"""torch's variable-length attention kernel, for heads whose values are narrower or wider than queries and keys.

Shapes: n queries, m keys, H query heads, K key-value heads, D width of queries and keys, W of values.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

_UNIT = 8  # the kernel's widths are multiples of it


class Lengths(NamedTuple):
    """Of packed sequences: int32 [sequences + 1] where each starts, and the end, on the device; the longest."""

    cu_queries: Tensor
    cu_keys: Tensor
    longest_queries: int
    longest_keys: int


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, *, scale: float | None, window: int | None = None
) -> Tensor:
    """Causal attention within each sequence on a GPU in half precision.

    query: [n, H, D]; key: [m, K, D]; value: [m, K, W]. scale: of scores, D ** -0.5 by default. window: a token sees
    itself and the `window - 1` before it. Returns [n, H, W].
    """
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads as they come, later versions want to be told.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    arguments: tuple[Any, ...] = (*of_one_width(query, key, value), *lengths)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window_size = (-1 if window is None else window - 1, 0)
    out = varlen_attn(*arguments, scale=scale, window_size=window_size, **grouped)
    return cast(Tensor, out)[..., : value.shape[-1]]


def of_one_width(*heads: Tensor) -> list[Tensor]:
    """Heads with zeros behind them up to one width: scores and the first columns of the output stay what they are."""
    width = _UNIT * math.ceil(max(tensor.shape[-1] for tensor in heads) / _UNIT)
    return [tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in heads]
