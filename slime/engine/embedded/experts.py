"""Mixture-of-experts layers whose result for a token does not depend, to the bit, on the other tokens.

Legend: T tokens, K experts of a token, E experts, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROW_MULTIPLE = 16
"""An expert's tokens are padded to a multiple: below about 12 rows a matrix product sums in another order."""


def exact_experts(layer: Any, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' weighted sum, [T, D]; called by transformers as an implementation of its expert layers.

    expert_TK: the experts chosen for each token; weight_TK: their weights.
    """
    num_tokens, num_chosen = expert_TK.shape
    output = hidden_TD.new_empty(num_tokens * num_chosen, hidden_TD.shape[-1])
    order = expert_TK.reshape(-1).argsort(stable=True)
    counts = torch.bincount(expert_TK.reshape(-1), minlength=layer.num_experts).tolist()
    for expert, pairs in enumerate(order.split(counts)):
        if len(pairs):
            rows = functional.pad(hidden_TD[pairs // num_chosen], (0, 0, 0, -len(pairs) % ROW_MULTIPLE))
            output[pairs] = _one_expert(layer, expert, rows)[: len(pairs)]
    weighted = output.view(num_tokens, num_chosen, -1) * weight_TK[:, :, None]
    return weighted.sum(dim=1).to(hidden_TD.dtype)


def _one_expert(layer: Any, expert: int, rows: Tensor) -> Tensor:
    if layer.has_gate:
        hidden = layer._apply_gate(_linear(layer, "gate_up_proj", expert, rows))
    else:
        hidden = layer.act_fn(_linear(layer, "up_proj", expert, rows))
    return _linear(layer, "down_proj", expert, hidden)


def _linear(layer: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(layer, name)[expert]
    bias = getattr(layer, f"{name}_bias")[expert] if layer.has_bias else None
    return functional.linear(rows, weight.T if layer.is_transposed else weight, bias)
