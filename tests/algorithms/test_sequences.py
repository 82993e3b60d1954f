"""What functions of whole sequences share: how a micro-batch is cut, and what is masked, changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slime.algorithms.gspo import sequence_log_ratio
from slime.algorithms.importance import MISOptions, mis
from slime.algorithms.opsm import keep_mask
from slime.algorithms.ppo import clipped_surrogate
from slime.algorithms.reduce import SequenceSum, per_sample_weights
from slime.algorithms.sequences import Sequences

MASKS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=5)
DEADLINE_S = 30.0


class Tokens(NamedTuple):
    """[T] each: two policies' log-probs, advantages that a sequence's tokens share, masks, owners, loss weights."""

    log_probs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    ids: Tensor
    weights: Tensor

    def select(self, places: Tensor) -> Tokens:
        return Tokens(*(field[places] for field in self))


def tokens_of(masks: list[list[int]], *, garbage: float = 0.0) -> Tokens:
    """The same at trained tokens for every `garbage`, which stands at the masked ones."""
    mask_T = torch.tensor([float(m) for mask in masks for m in mask], dtype=torch.float64)
    ids_T = torch.tensor([index for index, mask in enumerate(masks) for _ in mask])
    random = torch.Generator().manual_seed(len(mask_T))
    log_probs_T, shift_T = torch.randn(2, len(mask_T), dtype=torch.float64, generator=random)
    advantages_T = torch.randn(len(masks), dtype=torch.float64, generator=random)[ids_T]
    columns = [torch.where(mask_T != 0, x, garbage) for x in (log_probs_T, log_probs_T + 0.3 * shift_T, advantages_T)]
    return Tokens(*columns, mask_T, ids_T, per_sample_weights(mask_T, ids_T, len(masks)))


def local_sum(ids_T: Tensor, num_sequences: int) -> SequenceSum:
    return lambda x_T: torch.zeros(num_sequences, dtype=x_T.dtype).index_add(0, ids_T, x_T)


def plain(log_probs_T: Tensor, old_T: Tensor, advantages_T: Tensor) -> Tensor:
    return clipped_surrogate(log_probs_T - old_T, advantages_T, eps_low=0.2, eps_high=0.2).loss_T


def gspo(tokens: Tokens, log_probs_T: Tensor, sequences: Sequences) -> Tensor:
    log_ratio_T = sequence_log_ratio(log_probs_T, tokens.old, sequences=sequences)
    return clipped_surrogate(log_ratio_T, sequences.trained(tokens.advantages), eps_low=0.1, eps_high=0.1).loss_T


def opsm(tokens: Tokens, log_probs_T: Tensor, sequences: Sequences) -> Tensor:
    keep_T = keep_mask(log_probs_T, tokens.old, advantages_T=tokens.advantages, sequences=sequences, delta=0.02)
    return keep_T * plain(*map(sequences.trained, (log_probs_T, tokens.old, tokens.advantages)))


def mis_of(options: MISOptions) -> Callable[[Tokens, Tensor, Sequences], Tensor]:
    def corrected(tokens: Tokens, log_probs_T: Tensor, sequences: Sequences) -> Tensor:
        correction = mis(log_probs_T, tokens.old, sequences=sequences, options=options)
        return correction.weights_T * plain(*map(sequences.trained, (log_probs_T, tokens.old, tokens.advantages)))

    return corrected


LOSSES: dict[str, Callable[[Tokens, Tensor, Sequences], Tensor]] = {
    "gspo": gspo,
    "opsm": opsm,
    "mis sequence truncate": mis_of(MISOptions(level="sequence", high=1.1, veto=0.6)),
    "mis geometric mask": mis_of(MISOptions(level="geometric", mode="mask", low=0.9, high=1.1)),
    "mis token clip, sequence rejection": mis_of(MISOptions(mode="clip", rs_level="sequence", rs_low=0.8, rs_high=1.3)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def loss_and_gradient(name: str, tokens: Tokens, sequence_sum: SequenceSum) -> tuple[Tensor, Tensor]:
    """Weighted sum of the loss over these tokens, and [T] its gradient."""
    log_probs_T = tokens.log_probs.clone().requires_grad_()
    loss_T = LOSSES[name](tokens, log_probs_T, Sequences(tokens.mask, tokens.ids, sequence_sum))
    loss = (tokens.weights * loss_T).sum()
    (gradient_T,) = torch.autograd.grad(loss, log_probs_T)
    return loss.detach(), gradient_T


def whole(name: str, tokens: Tokens) -> tuple[Tensor, Tensor]:
    return loss_and_gradient(name, tokens, local_sum(tokens.ids, int(tokens.ids.max()) + 1))


@given(masks=MASKS)
def test_totals_and_means_are_those_of_the_trained_tokens_of_the_sequence(masks: list[list[int]]) -> None:
    tokens = tokens_of(masks, garbage=math.nan)
    sequences = Sequences(tokens.mask, tokens.ids, local_sum(tokens.ids, len(masks)))
    for place, owner in enumerate(tokens.ids.tolist()):
        kept = [float(tokens.old[t]) for t in range(len(tokens.ids)) if tokens.ids[t] == owner and tokens.mask[t]]
        assert sequences.total(tokens.old)[place].item() == pytest.approx(sum(kept))
        assert sequences.mean(tokens.old)[place].item() == pytest.approx(sum(kept) / len(kept) if kept else 0.0)


@every_loss
@given(masks=MASKS, seed=st.integers(0, 99))
def test_context_parallel_ranks_add_up_to_the_whole(name: str, masks: list[list[int]], seed: int) -> None:
    """Each of two ranks, a thread, holds any part of the tokens, perhaps none; `sequence_sum` adds the other's."""
    tokens = tokens_of(masks)
    expected, expected_gradient_T = whole(name, tokens)
    rank_T = torch.randint(2, tokens.ids.shape, generator=torch.Generator().manual_seed(seed))
    barrier, shares = Barrier(2), [torch.empty(0), torch.empty(0)]

    def run(rank: int) -> tuple[Tensor, Tensor]:
        part = tokens.select(rank_T == rank)

        def sequence_sum(x_T: Tensor) -> Tensor:
            shares[rank] = local_sum(part.ids, len(masks))(x_T)
            barrier.wait(DEADLINE_S)
            total_S = shares[0] + shares[1]
            barrier.wait(DEADLINE_S)
            return total_S

        return loss_and_gradient(name, part, sequence_sum)

    with ThreadPoolExecutor(2) as pool:
        (first, first_gradient_T), (second, second_gradient_T) = pool.map(run, [0, 1])
    torch.testing.assert_close(first + second, expected)
    torch.testing.assert_close(first_gradient_T, expected_gradient_T[rank_T == 0])
    torch.testing.assert_close(second_gradient_T, expected_gradient_T[rank_T == 1])


@every_loss
@given(masks=MASKS, seed=st.integers(0, 99))
def test_micro_batches_in_any_order_add_up_to_the_step(name: str, masks: list[list[int]], seed: int) -> None:
    tokens = tokens_of(masks)
    expected, expected_gradient_T = whole(name, tokens)
    order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(seed)).tolist()
    total, gradient_T = torch.zeros((), dtype=torch.float64), torch.zeros_like(tokens.old)
    for members in (order[: len(order) // 2], order[len(order) // 2 :]):
        if not members:
            continue
        places = torch.cat([torch.nonzero(tokens.ids == member).squeeze(1) for member in members])
        lengths = torch.tensor([len(masks[member]) for member in members])
        part = tokens.select(places)._replace(ids=torch.arange(len(members)).repeat_interleave(lengths))
        loss, part_gradient_T = whole(name, part)
        total, gradient_T[places] = total + loss, part_gradient_T
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient_T, expected_gradient_T)


@every_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_at_masked_tokens_reaches_neither_loss_nor_gradient(name: str, garbage: float) -> None:
    masks = [[1, 0, 1, 1], [0], [0, 0, 0], [1], [0, 1, 0]]
    expected, expected_gradient_T = whole(name, tokens_of(masks))
    loss, gradient_T = whole(name, tokens_of(masks, garbage=garbage))
    assert torch.equal(loss, expected)
    assert torch.equal(gradient_T, expected_gradient_T)
    assert (gradient_T[tokens_of(masks).mask == 0] == 0).all()
