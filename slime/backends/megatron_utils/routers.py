"""Routing replay in Megatron's routers.

Megatron's own `RouterReplay` has one list of routers for all models of a process, replays all tokens or none, and must
be told when a backward begins, which schedules do not say. Routers ask by one method, which is answered here instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from slime.backends.megatron_utils.packing import Inputs
from slime.backends.shared.routing_replay import RouterReplay, RoutingReplay


class MegatronRouter(RouterReplay):
    """What a `TopKRouter` asks for the highest scores."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices [n, K] of the experts to go to. scores: [n, E]; the others as Megatron's own."""
        assert default_compute_topk is not None
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        chosen = self.choose(own)
        return (values, own) if chosen is own else (scores.gather(1, chosen), chosen)


def attach_routing_replay(lm: GPTModel, config: TransformerConfig) -> RoutingReplay:
    """The routers of this stage replay from now on. Raises ValueError for a model or a Megatron that has none."""
    if config.num_moe_experts is None:
        raise ValueError("--use-routing-replay: the model has no routers of experts. Drop it.")
    if config.moe_router_fusion:
        raise ValueError("--use-routing-replay: Megatron's --moe-router-fusion chooses in a kernel. Drop one of them.")
    routers: list[RouterReplay] = []
    for layer in lm.decoder.layers:
        router: Any = getattr(layer.mlp, "router", None)
        if router is not None and not hasattr(router, "router_replay"):
            raise ValueError("--use-routing-replay needs Megatron-core 0.16 or newer.")
        if router is not None:
            router.router_replay = MegatronRouter(layer.layer_number - 1)
            routers.append(router.router_replay)
    return RoutingReplay(
        routers,
        num_layers=config.num_layers,
        top_k=config.moe_router_topk,
        is_recomputed=config.recompute_granularity == "full" or "moe" in (config.recompute_modules or ()),
    )


@contextmanager
def following(
    replays: dict[nn.Module, RoutingReplay | None],
    stage: nn.Module,
    inputs: Inputs,
    *,
    device: torch.device,
    is_trained: bool,
) -> Iterator[None]:
    """One micro-batch through `stage`, whose routers go where it says; without a replay of it where they please."""
    replay = replays[stage]
    if replay is None:
        yield
        return
    with replay.following(inputs.whole, inputs.places, device=device, is_trained=is_trained):
        yield
    replay.tell(inputs.whole)
