"""A pass cut into shares."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slime.engine.embedded.plan import Batch
from slime.engine.embedded.shares import cut


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=12), st.integers(1, 5))
def test_every_sequence_and_row_is_in_one_share(spans: list[tuple[int, int]], count: int) -> None:
    starts, lengths = (np.array(values) for values in zip(*spans, strict=True))
    num_tokens = int(lengths.sum())
    tokens = [1000 + token for token in range(num_tokens)]
    batch = Batch(tokens, np.arange(len(spans)), starts, starts + lengths, np.zeros((len(spans), 8), dtype=np.int64))
    wanted = list(range(0, num_tokens, 3))[::-1]
    shares = cut(batch, wanted, count)
    assert len(shares) == min(count, len(spans))
    found = {}
    for share in shares:
        assert share.batch.rows.tolist() == sorted(share.batch.rows.tolist())
        assert np.array_equal(share.batch.starts, starts[share.batch.rows])
        assert np.array_equal(share.batch.ends, (starts + lengths)[share.batch.rows])
        own = [token for row in share.batch.rows for token in range(lengths[:row].sum(), lengths[: row + 1].sum())]
        assert share.batch.tokens == [1000 + token for token in own]
        found |= {place: share.batch.tokens[row] for place, row in zip(share.places, share.rows, strict=True)}
    assert sorted(row for share in shares for row in share.batch.rows) == list(range(len(spans)))
    assert found == {place: 1000 + token for place, token in enumerate(wanted)}


def test_decoding_sequences_spread_evenly() -> None:
    ends = np.sort(np.random.default_rng(0).integers(10, 600, 64))
    batch = Batch([0] * 64, np.arange(64), ends - 1, ends, np.zeros((64, 40), dtype=np.int64))
    sums = [int(share.batch.ends.sum()) for share in cut(batch, [], 2)]
    assert abs(sums[0] - sums[1]) < 0.05 * sum(sums)
