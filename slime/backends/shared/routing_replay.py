"""Routing replay: the experts that a token once had, it has again.

A router scores all experts of a layer and sends a token to the K of highest score. A ratio of two policies compares two
networks where their routers choose otherwise. Routing Replay (GSPO, arXiv:2507.18071, section 5.3) keeps the experts of
the old policy's log-probs for the update; Rollout Routing Replay (R3, arXiv:2510.11370) keeps those of the engine that
sampled, for both. Only the choice is kept: expert i of the kept set I weighs exp(s_i) / sum over j in I of exp(s_j) (or
whatever the model makes of scores), s being the current router's, so that gradients reach it.

Legend: n tokens of a micro-batch on this rank, N of the whole, L layers of the model, K experts of a token. In tables
of experts [n, L, K] a token whose experts are not known has -1; its router chooses, and that is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from slime.data.packed import EXPERT_DTYPE, PackedBatch

MISMATCH = "routing_replay_mismatch"  # train/...: see `mismatch`


class RouterReplay:
    """What one router does with its choice. layer: its place in the whole model, from 0."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.known: Tensor | None = None  # [n, K] of the forward that runs; None: the router is on its own
        self.chosen: Tensor | None = None  # [n, K] of the last one
        self.recomputed: deque[Tensor] | None = None  # of forwards whose backward computes them again, oldest first
        self.counts: Tensor | None = None  # int64 [2] of forwards that are trained: replayed choices, and others' among

    def choose(self, own: Tensor) -> Tensor:
        """The experts to go to, int64 [n, K], where the router alone would go to `own`."""
        if self.recomputed and torch._C._current_graph_task_id() != -1:  # in a backward
            return self.recomputed.popleft().long()
        if self.known is None:
            return own
        is_known = self.known[:, :1] >= 0
        chosen = torch.where(is_known, self.known.long(), own)
        self.chosen = chosen.to(EXPERT_DTYPE)
        if self.recomputed is not None:
            self.recomputed.append(self.chosen)
        if self.counts is not None:
            is_other = ~(chosen[:, :, None] == own[:, None, :]).any(2)
            self.counts += torch.stack([is_known.sum() * own.shape[1], is_other.sum()])
        return chosen


class RoutingReplay:
    """The routers of one model on this rank.

    num_layers, top_k: L of the whole model, and K. is_recomputed: the backward of a micro-batch computes routers again.
    """

    def __init__(self, routers: list[RouterReplay], *, num_layers: int, top_k: int, is_recomputed: bool) -> None:
        self.routers = routers
        self.layers = [router.layer for router in routers]
        self.num_layers = num_layers
        self.top_k = top_k
        self.is_recomputed = is_recomputed
        self.found: tuple[Tensor, Tensor] | None = None  # places [n] and their table, of the last forward

    @contextmanager
    def following(
        self, batch: PackedBatch, places: Tensor, *, device: torch.device, is_trained: bool
    ) -> Iterator[None]:
        """A forward of the tokens at `places` [n] in [0, N) of `batch`, -1 for padding, with the experts it knows.

        Those it does not know it is told by `tell`, unless it is trained on. device: of the model. Raises ValueError
        where it knows experts of another model.
        """
        table = self._part_of(batch, places)
        known = table.to(device, non_blocking=True)
        for router in self.routers:
            router.known = known[:, router.layer]
            router.counts = self._counts(router, device) if is_trained else None
            router.recomputed = (router.recomputed or deque()) if is_trained and self.is_recomputed else None
        yield
        if self.routers and not is_trained:
            table[:, self.layers] = torch.stack([_chosen(router) for router in self.routers], 1).to(table.device)
            self.found = (places, table)
        for router in self.routers:
            router.known = router.chosen = None

    def _part_of(self, batch: PackedBatch, places: Tensor) -> Tensor:
        """[n, L, K]."""
        shape = (len(places), self.num_layers, self.top_k)
        if batch.routed_experts is None:
            return torch.full(shape, -1, dtype=EXPERT_DTYPE, device=places.device)
        if batch.routed_experts.shape[1:] != shape[1:]:
            raise ValueError(
                f"rollout_routed_experts has (layers, experts of a token) {tuple(batch.routed_experts.shape[1:])}, the "
                f"model {shape[1:]}"
            )
        return batch.routed_experts[places.clamp(min=0)].masked_fill((places < 0)[:, None, None], -1)

    def tell(self, batch: PackedBatch) -> None:
        """Have `batch`, on whatever device, know the experts of the last forward that was not trained on."""
        if self.found is None:
            return
        places, table = (tensor.to(batch.input_ids.device) for tensor in self.found)
        self.found = None
        if batch.routed_experts is None:
            shape = (len(batch.input_ids), self.num_layers, self.top_k)
            batch.routed_experts = torch.full(shape, -1, dtype=EXPERT_DTYPE, device=places.device)
        batch.routed_experts[places[places >= 0]] = table[places >= 0]

    @staticmethod
    def _counts(router: RouterReplay, device: torch.device) -> Tensor:
        return torch.zeros(2, dtype=torch.int64, device=device) if router.counts is None else router.counts


def mismatch(replays: Sequence[RoutingReplay], device: torch.device) -> float:
    """Share of the choices replayed in a step that has ended that the routers would have made otherwise; 0 of none.

    replays: all of this rank's. A collective of the world.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for router in (router for replay in replays for router in replay.routers):
        counts += 0 if router.counts is None else router.counts
        router.counts = router.recomputed = None
    dist.all_reduce(counts)
    num_replayed, num_other = counts.tolist()
    return float(num_other / max(1, num_replayed))


def _chosen(router: RouterReplay) -> Tensor:
    assert router.chosen is not None, "a router was not asked"
    return router.chosen
