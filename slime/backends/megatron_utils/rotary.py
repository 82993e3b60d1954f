"""Rotary positions of packed tokens from one table a micro-batch, for slime's own attention.

Megatron's layers put that table together from slices of each sequence, once for queries and once for keys, and read
lengths while they do, which `torch.compile` cannot follow. Shapes: n tokens, H heads, D head width, R <= D rotated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor


class Rotation(NamedTuple):
    """Angles of a micro-batch's tokens. is_interleaved: neighbours are rotated together, not the two halves."""

    cos: Tensor  # [n, 1, R], of the model's dtype
    sin: Tensor
    is_interleaved: bool


def take_rotation(lm: GPTModel) -> None:
    """Layers of `lm` rotate no more: its attention does, by the `Rotation` of each micro-batch."""
    lm.position_embedding_type = "none"


def rotation_of(lm: GPTModel, position_ids: Tensor, longest: int) -> Rotation | None:
    """What tokens at `position_ids` (int64 [n], below `longest`) are rotated by; None where the layers do it."""
    if lm.position_embedding_type != "none":
        return None
    angles_LR, dtype = lm.rotary_pos_emb.get_emb(longest)[:, 0], lm.config.params_dtype
    cos, sin = (table.to(dtype).index_select(0, position_ids) for table in (angles_LR.cos(), angles_LR.sin()))
    return Rotation(cos, sin, lm.rotary_pos_emb.rotary_interleaved)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """heads: [n, H, D], of which the first R numbers are rotated. Returns the same shape."""
    width = rotation.cos.shape[-1]
    turned, kept = heads[..., :width], heads[..., width:]
    if rotation.is_interleaved:
        quarter_turn = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        quarter_turn = torch.cat((-second, first), dim=-1)
    turned = turned * rotation.cos + quarter_turn * rotation.sin
    return turned if width == heads.shape[-1] else torch.cat((turned, kept), dim=-1)
