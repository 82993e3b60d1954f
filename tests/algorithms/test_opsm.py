from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slime.algorithms.opsm import keep_mask
from slime.algorithms.sequences import Sequences

# (old minus new log-prob, trained, advantage) of each token of each sequence
TOKEN = st.tuples(st.floats(-1, 1, width=16), st.booleans(), st.sampled_from([-1.0, 0.0, 1.0]))


@given(batch=st.lists(st.lists(TOKEN, min_size=1, max_size=6), min_size=1, max_size=5))
def test_bad_tokens_of_sequences_with_a_large_kl_are_dropped_and_no_others(
    batch: list[list[tuple[float, bool, float]]],
) -> None:
    delta = 0.1
    expected = []
    for tokens in batch:
        trained = [gap for gap, is_trained, _ in tokens if is_trained]
        is_far = bool(trained) and sum(trained) / len(trained) > delta
        expected += [0.0 if is_far and is_trained and advantage < 0 else 1.0 for _, is_trained, advantage in tokens]
    gap_T, mask_T, advantages_T = torch.tensor([t for tokens in batch for t in tokens], dtype=torch.float64).T
    ids_T = torch.tensor([index for index, tokens in enumerate(batch) for _ in tokens])

    def sequence_sum(x_T: Tensor) -> Tensor:
        return torch.zeros(len(batch), dtype=x_T.dtype).index_add(0, ids_T, x_T)

    log_probs_T = torch.full_like(gap_T, -2.0, requires_grad=True)
    keep_T = keep_mask(
        log_probs_T,
        gap_T - 2.0,
        advantages_T=advantages_T,
        sequences=Sequences(mask_T, ids_T, sequence_sum),
        delta=delta,
    )
    assert keep_T.tolist() == expected
    assert not keep_T.requires_grad
