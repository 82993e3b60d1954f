"""Attention of packed tokens over the paged cache, called by Hugging Face's model code in place of its own.

Legend: T tokens of a pass, Hq query and H key-value heads, G = Hq / H, D head dimension; S, Q, K: a block's sequences,
queries, keys. Where values are of another width than queries and keys, as in latent attention, D is the larger of the
two and zeros stand behind the narrower: they add nothing.

Exactness. In float32 on a CPU a token's result must not depend, to the bit, on its neighbours. Matrix products sum
in an order that depends on the shape only below 4 rows and beyond 192 summands (MKL in its strict mode, which the
server chooses), so a product here has at least MIN_ROWS rows, and probabilities times values is summed over KEY_CHUNK
tokens at a time. Padded keys get weight 0, which adds exactly.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slime.engine.embedded.kv_cache import KVCache
from slime.engine.embedded.plan import Block, Plan
from slime.engine.embedded.refusal import Refused

MIN_ROWS = 4
KEY_CHUNK = 128


class PagedAttention(threading.local):
    """The attention function of one model; `plan` is set before each forward pass. Every thread has one of its own."""

    def __init__(self, cache: KVCache, *, exact: bool) -> None:
        self.plan: Plan | None = None
        self._cache = cache
        self._attend = attend_exactly if exact else attend
        self._scratch: Tensor | None = None

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_unused: object,
    ) -> tuple[Tensor, None]:
        """Stores key and value [1, H, T, <= D], attends with query [1, Hq, T, <= D]; returns [1, T, Hq, <= D]."""
        plan = self.plan
        assert plan is not None, "the model ran without a plan"
        pool = self._cache.layer(module.layer_idx)
        _, num_heads, _, _, head_dim = pool.shape
        width, value_width = query.shape[-1], value.shape[-1]
        if not key.shape[1] == value.shape[1] == num_heads or max(key.shape[-1], value_width) != head_dim:
            raise Refused(
                f"the embedded engine cannot serve attention with keys of {list(key.shape[1::2])} and values of "
                f"{list(value.shape[1::2])} (heads, dimension): the config says {[num_heads, head_dim]}. "
                "Use SGLang for it."
            )
        slots = pool.view(2, num_heads, -1, head_dim)
        query, key, value = (_widened(tensor, head_dim) for tensor in (query, key, value))
        slots[0].index_copy_(1, plan.slots, key[0])
        slots[1].index_copy_(1, plan.slots, value[0])
        scale = scaling if scaling is not None else width**-0.5
        output = query.new_empty(query.shape[2] + 1, query.shape[1], head_dim)
        output[plan.num_tokens :] = 0  # else padding could bring a NaN into the dummy page, and from there to others
        for block in plan.blocks:
            keys, values = self._gather(pool, block)
            result = self._attend(
                _queries(query[0], block, num_heads), keys, values, block.bias(sliding_window), scale, softcap
            )
            _scatter(output, result, block)
        return output[None, :-1, :, :value_width], None

    def _gather(self, pool: Tensor, block: Block) -> Tensor:
        """The block's pages side by side: [2, H, S, K, D] of pool [2, H, N, P, D], in memory that is used again."""
        _, num_heads, num_pages, page_size, head_dim = pool.shape
        size = 2 * num_heads * len(block.pages) * page_size * head_dim
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = pool.new_empty(size)
        target = self._scratch[:size].view(2 * num_heads, len(block.pages), page_size * head_dim)
        torch.index_select(pool.view(2 * num_heads, num_pages, -1), 1, block.pages, out=target)
        return target.view(2, num_heads, block.num_sequences, block.num_keys, head_dim)


def _widened(heads: Tensor, width: int) -> Tensor:
    return heads if heads.shape[-1] == width else functional.pad(heads, (0, width - heads.shape[-1]))


def attend_exactly(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention of query [H, S, Q, G, D] over key, value [H, S, K, D] with bias [S, Q, 1, K], in the query's shape.

    A query's result is, to the bit, a function of the query and the keys it sees.
    """
    num_heads, num_sequences, num_queries, group, head_dim = query.shape
    num_rows = max(num_queries, -(-MIN_ROWS // group))
    if num_rows > num_queries:
        query = functional.pad(query, (0, 0, 0, 0, 0, num_rows - num_queries))
    count = num_heads * num_sequences
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    rows = query.reshape(count, num_rows * group, head_dim)
    scores = torch.baddbmm(rows.new_empty(1), rows, key.transpose(1, 2), beta=0, alpha=scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.view(num_heads, num_sequences, num_rows, group, -1).add_(bias)
    weights = torch.softmax(scores, dim=-1)
    output = torch.bmm(weights[:, :, :KEY_CHUNK], value[:, :KEY_CHUNK])
    for start in range(KEY_CHUNK, value.shape[1], KEY_CHUNK):
        chunk = slice(start, start + KEY_CHUNK)
        output += torch.bmm(weights[:, :, chunk], value[:, chunk])
    return output.view(num_heads, num_sequences, num_rows, group, head_dim)[:, :, :num_queries]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float | None) -> Tensor:
    """As `attend_exactly`, by torch's fused kernels where they can, in the query's type."""
    num_heads, num_sequences, num_queries, group, head_dim = query.shape
    rows = query.reshape(num_heads, num_sequences, num_queries * group, head_dim).transpose(0, 1)
    mask = bias.to(query.dtype).expand(-1, -1, group, -1).reshape(num_sequences, 1, num_queries * group, -1)
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    if softcap is None:
        result = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    else:
        scores = torch.matmul(rows, key.transpose(-1, -2)).float() * scale
        weights = torch.softmax((scores / softcap).tanh() * softcap + mask, dim=-1)
        result = torch.matmul(weights.to(value.dtype), value)
    return result.transpose(0, 1).reshape(num_heads, num_sequences, num_queries, group, head_dim)


def _queries(query: Tensor, block: Block, num_heads: int) -> Tensor:
    """The block's queries, [H, S, Q, G, D], of query [Hq, T, D]."""
    if isinstance(block.tokens, slice):
        picked = query[:, block.tokens]
    else:
        picked = query.index_select(1, block.tokens.clamp(max=query.shape[1] - 1))
    return (
        picked.unflatten(1, (block.num_sequences, block.num_queries))
        .unflatten(0, (num_heads, -1))
        .permute(0, 2, 3, 1, 4)
    )


def _scatter(output: Tensor, result: Tensor, block: Block) -> None:
    """Writes a block's result [H, S, Q, G, D] to the rows of output [T + 1, Hq, D]; padding goes to the last row."""
    by_token = result.permute(1, 2, 0, 3, 4)
    if isinstance(block.tokens, slice):
        output[block.tokens].view(by_token.shape).copy_(by_token)
    else:
        output.index_copy_(0, block.tokens, by_token.reshape(-1, *output.shape[1:]))
