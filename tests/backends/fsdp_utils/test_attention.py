from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slime.backends.fsdp_utils.attention import Packing, packed_attention

CPU = torch.device("cpu")
LENGTHS = [
    [1],
    [1, 1, 1],
    [5, 5, 5],  # one bucket
    [20, 1, 7, 19, 2, 13, 6],  # several buckets, mixed order
    [2, 3, 200],
]


def qkv(
    num_tokens: int, *, query_heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(1, heads, num_tokens, 8) for heads in (query_heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def reference(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scale: float
) -> Tensor:
    """Softmax written out, one sequence and one query at a time. Returns [1, N, H, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows, start = [], 0
    for length in lengths:
        for place in range(start, start + length):
            first = start if window is None else max(start, place - window + 1)
            scores = (query[0, :, place, None] * key[0, :, first : place + 1]).sum(-1) * scale
            rows.append((scores.softmax(-1)[..., None] * value[0, :, first : place + 1]).sum(1))
        start += length
    return torch.stack(rows)[None]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_output_and_gradients_equal_softmax_written_out(
    lengths: list[int], query_heads: int, key_heads: int, window: int | None
) -> None:
    inputs = qkv(sum(lengths), query_heads=query_heads, key_heads=key_heads)
    ours, _ = packed_attention(
        nn.Module(), *inputs, None, scaling=0.3, sliding_window=window, packing=Packing(lengths, CPU)
    )
    theirs = reference(*inputs, lengths, window, 0.3)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, expected)


def test_the_default_scale_is_that_of_the_head_width() -> None:
    inputs = qkv(6)
    ours, _ = packed_attention(nn.Module(), *inputs, None, packing=Packing([4, 2], CPU))
    torch.testing.assert_close(ours, reference(*inputs, [4, 2], None, 8**-0.5))


def test_a_window_longer_than_every_sequence_is_none() -> None:
    inputs = qkv(9)
    packing = Packing([4, 5], CPU)
    windowed, _ = packed_attention(nn.Module(), *inputs, None, sliding_window=5, packing=packing)
    plain, _ = packed_attention(nn.Module(), *inputs, None, packing=packing)
    assert torch.equal(windowed, plain)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_buckets_hold_every_token_once_and_little_padding(lengths: list[int]) -> None:
    packing = Packing(lengths, CPU)
    positions = torch.cat([bucket.packed for bucket in packing.buckets])
    assert sorted(positions.tolist()) == list(range(sum(lengths)))
    assert torch.equal(positions[packing.inverse], torch.arange(sum(lengths)))
    for bucket in packing.buckets:
        assert torch.equal(bucket.gather.flatten()[bucket.padded], bucket.packed)
        assert len(bucket.packed) >= 0.7 * bucket.gather.numel()
    assert packing.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def test_a_model_that_swallows_keyword_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match="packed sequences would leak"):
        packed_attention(nn.Module(), *qkv(4), None)


def test_capped_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="caps attention scores"):
        packed_attention(nn.Module(), *qkv(4), None, softcap=30.0, packing=Packing([4], CPU))


def test_attention_sinks_are_refused() -> None:
    with pytest.raises(ValueError, match="has attention sinks"):
        packed_attention(nn.Module(), *qkv(4), None, s_aux=torch.zeros(4), packing=Packing([4], CPU))
