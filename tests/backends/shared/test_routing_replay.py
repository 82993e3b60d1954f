"""What one router does with its choice. That models follow is tested with each backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import random_batch

from slime.backends.shared.routing_replay import RouterReplay, RoutingReplay, mismatch
from slime.data.packed import PackedBatch, pack_rows

CPU = torch.device("cpu")


def one_batch() -> PackedBatch:
    batch = random_batch(group_sizes=(1,))
    return pack_rows(batch, [0], np.ones(len(batch.loss_mask), dtype=np.float32))


def replay_of(*routers: RouterReplay, is_recomputed: bool = False) -> RoutingReplay:
    return RoutingReplay(list(routers), num_layers=3, top_k=2, is_recomputed=is_recomputed)


def test_a_choice_is_told_once_and_then_followed() -> None:
    router, batch = RouterReplay(1), one_batch()
    replay, places = replay_of(router), torch.arange(3)
    first, other = torch.tensor([[0, 1], [2, 3], [1, 3]]), torch.tensor([[0, 2], [3, 2], [0, 2]])
    with replay.following(batch, places, device=CPU, is_trained=False):
        assert router.choose(first).equal(first)
    replay.tell(batch)
    assert batch.routed_experts is not None
    assert batch.routed_experts[:3, 1].tolist() == first.tolist()
    assert (batch.routed_experts[3:] == -1).all() and (batch.routed_experts[:, [0, 2]] == -1).all()
    with replay.following(batch, places, device=CPU, is_trained=False):
        assert router.choose(other).equal(first)
    assert router.choose(other) is other, "on its own where nobody asked it to follow"


def test_a_token_that_is_not_known_is_the_routers_own_and_padding_is_told_to_nobody() -> None:
    router, batch = RouterReplay(0), one_batch()
    batch.routed_experts = torch.full((len(batch.input_ids), 3, 2), -1, dtype=torch.int16)
    batch.routed_experts[2] = 3
    own = torch.tensor([[0, 1], [2, 3], [1, 0]])
    replay = replay_of(router)
    with replay.following(batch, torch.tensor([2, -1, 0]), device=CPU, is_trained=False):
        assert router.choose(own).tolist() == [[3, 3], [2, 3], [1, 0]]
    replay.tell(batch)
    assert batch.routed_experts[[0, 1, 2], 0].tolist() == [[1, 0], [-1, -1], [3, 3]]


def test_a_backward_computes_the_oldest_forward_again() -> None:
    router, batch = RouterReplay(0), one_batch()
    replay = replay_of(router, is_recomputed=True)
    choices = [torch.tensor([[number, 3]]) for number in range(2)]
    for own in choices:
        with replay.following(batch, torch.tensor([-1]), device=CPU, is_trained=True):
            router.choose(own)
    again: list[torch.Tensor] = []

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
            again.append(router.choose(torch.tensor([[2, 2]])))
            return gradients[0]

    for _ in choices:
        Recomputed.apply(torch.ones(1, requires_grad=True)).backward()
    assert [chosen.tolist() for chosen in again] == [own.tolist() for own in choices]


def test_the_mismatch_counts_experts_that_the_router_would_not_have_chosen() -> None:
    router, batch = RouterReplay(0), one_batch()
    batch.routed_experts = torch.full((len(batch.input_ids), 3, 2), -1, dtype=torch.int16)
    batch.routed_experts[:2, 0] = torch.tensor([[0, 1], [2, 3]], dtype=torch.int16)
    replay = replay_of(router)
    with replay.following(batch, torch.arange(3), device=CPU, is_trained=True):
        router.choose(torch.tensor([[1, 0], [2, 1], [0, 1]]))
    assert mismatch([replay], CPU) == 1 / 4
    assert mismatch([replay], CPU) == 0


def test_experts_of_another_model_are_refused() -> None:
    batch = one_batch()
    batch.routed_experts = torch.zeros(len(batch.input_ids), 5, 2, dtype=torch.int16)
    with (
        pytest.raises(ValueError, match=r"\(5, 2\), the model \(3, 2\)"),
        replay_of(RouterReplay(0)).following(batch, torch.arange(3), device=CPU, is_trained=True),
    ):
        pass
