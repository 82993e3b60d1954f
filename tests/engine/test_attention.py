"""Paged attention against attention over whole sequences in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from slime.engine.embedded.attention import MIN_ROWS, PagedAttention
from slime.engine.embedded.kv_cache import PAGE_SIZE, KVCache
from slime.engine.embedded.plan import Batch, Limits, make_plan
from slime.engine.embedded.refusal import Refused

HEADS, HEAD_DIM, LAYERS = 2, 8, 2
CPU = torch.device("cpu")


def dense(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of one sequence: query [Hq, L, D], key and value [H, L, D]; float64, by the textbook."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = query.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones(length, length, dtype=torch.bool).tril(-window)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value.repeat_interleave(group, 0)


class Sequences:
    """Random queries, keys and values of several sequences, computed piece by piece through the paged attention."""

    def __init__(self, lengths: list[int], *, group: int, exact: bool) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + group)
        shape = (LAYERS, HEADS * (group + 2))
        self.tensors = [torch.randn(*shape, length, HEAD_DIM, generator=generator) for length in lengths]
        self.group = group
        self.cache = KVCache(LAYERS, HEADS, HEAD_DIM, num_tokens=256 * PAGE_SIZE, dtype=torch.float32, device=CPU)
        width = -(-max(lengths) // PAGE_SIZE)
        pages = torch.randperm(self.cache.num_pages - 1, generator=generator)[: width * len(lengths)] + 1
        self.table = pages.view(len(lengths), width).numpy()
        self.attention = PagedAttention(self.cache, exact=exact)

    def parts(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of [.., Hq + 2 H, T, D]."""
        return tensor.split([HEADS * self.group, HEADS, HEADS], dim=-3)  # type: ignore[return-value]

    def run(self, spans: dict[int, tuple[int, int]], **options: float | None) -> dict[int, Tensor]:
        """Computes tokens [start, end) of each named sequence in one pass; both layers' results, [2, Hq, T, D]."""
        order = sorted(spans, key=lambda name: (spans[name][1] - spans[name][0] > 1, spans[name][1]))
        starts, ends = (np.array([spans[name][side] for name in order]) for side in range(2))
        rows = np.array(order)
        batch = Batch([0] * int((ends - starts).sum()), rows, starts, ends, self.table)
        plan = make_plan(batch, Limits(16, HEADS * self.group, MIN_ROWS, max_decode_pages=40), device=CPU)
        self.attention.plan = plan
        pieces = [self.tensors[name][:, :, slice(*spans[name])] for name in order]
        padding = torch.full((LAYERS, HEADS * (self.group + 2), len(plan.positions) - plan.num_tokens, HEAD_DIM), 7.0)
        packed = torch.cat([*pieces, padding], dim=2)
        outputs = []
        for layer in range(LAYERS):
            query, key, value = self.parts(packed[layer][None])
            module = SimpleNamespace(layer_idx=layer)
            output, _ = self.attention(module, query, key, value, None, **options)  # type: ignore[arg-type]
            outputs.append(output[0, : plan.num_tokens].transpose(0, 1))
        sizes = (ends - starts).tolist()
        return dict(zip(order, torch.stack(outputs).split(sizes, dim=2), strict=True))

    def expected(self, name: int, layer: int, **options: float | None) -> Tensor:
        """The same by dense attention over the whole sequence."""
        query, key, value = self.parts(self.tensors[name][layer])
        return dense(query, key, value, **options)  # type: ignore[arg-type]


def check(sequences: Sequences, name: int, span: tuple[int, int], result: Tensor, **options: float | None) -> None:
    for layer in range(LAYERS):
        expected = sequences.expected(name, layer, **options)[:, slice(*span)]
        assert torch.allclose(result[layer].double(), expected, atol=2e-6)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 5}, {"softcap": 1.5}, {"scaling": 0.3, "sliding_window": 20, "softcap": 2.0}]
)
def test_chunks_and_single_tokens_attend_as_whole_sequences(exact: bool, group: int, options: dict[str, float]) -> None:
    lengths = [1, 2, 9, 16, 17, 40, 150]
    sequences = Sequences(lengths, group=group, exact=exact)
    oracle = {
        "scale": options.get("scaling", HEAD_DIM**-0.5),
        "window": options.get("sliding_window"),
        "softcap": options.get("softcap"),
    }
    computed = dict.fromkeys(range(len(lengths)), 0)
    for chunk in (5, 1, 1, 30, 1, 1, 1, 120):
        spans = {n: (at, min(at + chunk, lengths[n])) for n, at in computed.items() if at < lengths[n]}
        for name, result in sequences.run(spans, **options).items():
            check(sequences, name, spans[name], result, **oracle)
            computed[name] = spans[name][1]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_result_is_the_same_to_the_bit_in_any_company(group: int) -> None:
    lengths = [300, 3, 70, 128, 129, 500]

    def results(spans: dict[int, tuple[int, int]]) -> dict[int, Tensor]:
        sequences = Sequences(lengths, group=group, exact=True)
        for name, (start, _) in spans.items():
            if start:
                sequences.run({name: (0, start)})
        return sequences.run(spans)

    together = results({0: (250, 300), 1: (0, 3), 2: (69, 70), 3: (127, 128), 4: (100, 129), 5: (499, 500)})
    for name, span in ((0, (299, 300)), (1, (2, 3)), (2, (10, 70)), (3, (0, 128)), (4, (128, 129)), (5, (498, 500))):
        alone = results({name: span})[name]
        assert torch.equal(alone[:, :, -1], together[name][:, :, -1])


def test_padding_tokens_leave_the_dummy_page_finite_and_reach_nobody() -> None:
    sequences = Sequences([5, 20], group=2, exact=True)
    first = sequences.run({0: (0, 5), 1: (0, 20)})
    again = sequences.run({0: (0, 5)})
    assert torch.equal(first[0], again[0])
    assert bool(sequences.cache.layer(0)[:, :, 0].isfinite().all())


@pytest.mark.parametrize("widths", [(8, 5), (5, 8)])
def test_values_of_another_width_than_keys_are_attended_to_exactly(widths: tuple[int, int]) -> None:
    """Against the same heads with nothing beside them; the scale is that of the queries' own width."""
    narrow = Sequences([37], group=2, exact=True)
    query, key, value = narrow.parts(narrow.tensors[0])
    cut = [tensor[..., :width] for tensor, width in ((query, widths[0]), (key, widths[0]), (value, widths[1]))]
    batch = Batch([0] * 37, np.array([0]), np.array([0]), np.array([37]), narrow.table)
    plan = make_plan(batch, Limits(16, 2 * HEADS, MIN_ROWS, max_decode_pages=40), device=CPU)
    narrow.attention.plan = plan
    padding = len(plan.positions) - plan.num_tokens
    packed = [torch.cat([tensor[0], torch.ones(len(tensor[0]), padding, tensor.shape[-1])], dim=1) for tensor in cut]
    found, _ = narrow.attention(SimpleNamespace(layer_idx=0), *(tensor[None] for tensor in packed), None)
    expected = dense(*(tensor[0] for tensor in cut), scale=widths[0] ** -0.5, window=None, softcap=None)
    torch.testing.assert_close(found[0, :37].transpose(0, 1).double(), expected, rtol=0, atol=1e-6)


def test_heads_that_the_config_does_not_say_are_refused() -> None:
    sequences = Sequences([4], group=1, exact=True)
    sequences.attention.plan = make_plan(
        Batch([0] * 4, np.array([0]), np.array([0]), np.array([4]), sequences.table),
        Limits(16, HEADS, MIN_ROWS, max_decode_pages=40),
        device=CPU,
    )
    heads = torch.zeros(1, HEADS, 4, HEAD_DIM + 1)
    with pytest.raises(Refused, match=r"keys of \[2, 9\] and values of \[2, 9\] .* the config says \[2, 8\]"):
        sequences.attention(SimpleNamespace(layer_idx=0), heads, heads, heads, None)
