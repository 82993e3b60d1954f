"""Routing replay in models of transformers: their routers go to known experts, weighed by their own scores.

Shapes: n tokens, E experts, K of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slime.backends.shared.routing_replay import RouterReplay, RoutingReplay

Route = Callable[[Tensor], tuple[Tensor, ...]]
_NUM_CHECKED = 16  # tokens


def attach_routing_replay(lm: PreTrainedModel, layers: list[nn.Module], *, is_recomputed: bool) -> RoutingReplay:
    """The routers of `layers`, all of the model's, replay from now on.

    Raises ValueError for a model without experts, or whose routers do what is not known here.
    """
    routers, sizes = [], set()
    for index, layer in enumerate(layers):
        for block in layer.modules():
            if hasattr(block, "experts") and isinstance(getattr(block, "gate", None), nn.Module):
                router = RouterReplay(index)
                sizes.add(_attach(block, router, lm))
                routers.append(router)
    if not routers:
        raise ValueError(f"--use-routing-replay: {type(lm).__name__} has no routers of experts. Drop it.")
    (top_k,) = sizes
    return RoutingReplay(routers, num_layers=len(layers), top_k=top_k, is_recomputed=is_recomputed)


def _attach(block: Any, router: RouterReplay, lm: PreTrainedModel) -> int:
    """Returns K."""
    if hasattr(block, "route_tokens_to_experts"):
        route, probe = _sigmoid_router(block, router), torch.randn(_NUM_CHECKED, len(block.gate.weight))
        own: Route = block.route_tokens_to_experts
        top_k = int(own(probe)[0].shape[1])
        block.route_tokens_to_experts = torch.compiler.disable(route)
    else:
        route, probe = _softmax_router(block.gate, router), torch.randn(_NUM_CHECKED, block.gate.weight.shape[1])
        own = block.gate.forward
        top_k = int(own(probe)[-1].shape[1])
        block.gate.forward = torch.compiler.disable(route)
    with torch.no_grad():
        expected, found = own(probe), route(probe)
    if not all(torch.allclose(*pair, equal_nan=True) for pair in zip(expected, found, strict=True)):
        raise ValueError(f"--use-routing-replay: how {type(lm).__name__} weighs its experts is not known. Drop it.")
    return top_k


def _softmax_router(gate: Any, router: RouterReplay) -> Route:
    """Of Qwen's and Mixtral's kind: logits [n, E], weights and indices [n, K] from hidden states."""
    own: Route = gate.forward
    is_normalised = bool(getattr(gate, "norm_topk_prob", True))

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = own(hidden)
        chosen = router.choose(indices)
        kept = logits.softmax(-1, dtype=torch.float).gather(-1, chosen)
        kept = kept / kept.sum(-1, keepdim=True) if is_normalised else kept
        return logits, kept.to(weights.dtype), chosen

    return forward


def _sigmoid_router(block: Any, router: RouterReplay) -> Route:
    """Of DeepSeek-V3's and GLM's kind: indices and weights [n, K] from logits [n, E]."""
    own: Route = block.route_tokens_to_experts

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        indices, weights = own(logits)
        chosen = router.choose(indices)
        kept = logits.sigmoid().gather(-1, chosen)
        kept = kept / (kept.sum(-1, keepdim=True) + 1e-20) if block.norm_topk_prob else kept
        return chosen, (kept * block.routed_scaling_factor).to(weights.dtype)

    return route
