"""Floating-point operations of a training step, counted from a model's config.json.

The count is of the work that the model's formula asks for, as model-FLOPs utilisation has it: 2 a multiply-add, the
backward twice the forward; neither recomputation nor what sharing of prompts saves. Source: arXiv:2204.02311, app. B.

Legend: R samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def training_flops(
    config: Mapping[str, Any], total_lengths: NDArray[np.integer], response_lengths: NDArray[np.integer]
) -> float | None:
    """Operations of forward and backward over samples of these lengths, int [R]; logits of response tokens only.

    config: of a decoder with grouped-query attention and gated MLPs, dense or mixture of experts. None where it is of
    another kind: latent or linear attention, or fields that are missing.
    """
    fields = config.get("text_config", config)
    if "kv_lora_rank" in fields or set(fields.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        return None
    try:
        weights, logits = _layer_weights(fields), int(fields["hidden_size"]) * int(fields["vocab_size"])
        num_layers, width = int(fields["num_hidden_layers"]), _attention_width(fields)
    except KeyError:
        return None
    lengths = total_lengths.astype(np.float64)
    scores = 2.0 * width * float((lengths * (lengths + 1) / 2).sum())  # query times key, weight times value; causal
    products = weights * float(lengths.sum()) + scores
    return 3 * 2 * (num_layers * products + logits * float(response_lengths.sum()))


def _attention_width(fields: Mapping[str, Any]) -> int:
    heads, hidden = int(fields["num_attention_heads"]), int(fields["hidden_size"])
    return heads * int(fields.get("head_dim") or hidden // heads)


def _layer_weights(fields: Mapping[str, Any]) -> float:
    """Weights that a token meets in a layer, the mean over layers."""
    hidden, width = int(fields["hidden_size"]), _attention_width(fields)
    key_value_heads = int(fields.get("num_key_value_heads") or fields["num_attention_heads"])
    attention = hidden * (2 * width + 2 * width * key_value_heads // int(fields["num_attention_heads"]))
    num_experts = int(
        fields.get("num_experts") or fields.get("num_local_experts") or fields.get("n_routed_experts") or 0
    )
    if not num_experts:
        return attention + 3 * hidden * int(fields["intermediate_size"])
    expert = 3 * hidden * int(fields.get("moe_intermediate_size") or fields["intermediate_size"])
    active = int(fields["num_experts_per_tok"]) + int(fields.get("n_shared_experts") or 0)
    num_layers, num_dense = int(fields["num_hidden_layers"]), int(fields.get("first_k_dense_replace") or 0)
    sparse = active * expert + hidden * num_experts
    dense = 3 * hidden * int(fields["intermediate_size"])
    return attention + (num_dense * dense + (num_layers - num_dense) * sparse) / num_layers
