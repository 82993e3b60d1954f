"""Multi-head latent attention (arXiv:2405.04434, section 2.1) of Megatron's local layers, for tensor-parallel ranks.

Megatron's own shares the down projections there among tensor-parallel ranks, and then takes of the keys' rotary part,
which every head reads, the gradient of a rank's own heads alone. Here each rank holds the whole down projections and
gives them its tokens of the sequence, as with Transformer Engine. Shapes: n tokens of this rank, E width of the model,
O of a projection.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn


class LatentAttention(MLASelfAttention):
    """`self_attention` of a layer spec, whose submodules are those of Megatron's local layers."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.q_lora_rank)
        self.linear_kv_down_proj = WholeLinear(config, config.kv_lora_rank + config.qk_pos_emb_head_dim)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The spec's modules, as they are. Megatron-LM after 0.16 would norm queries that have no low rank."""
        projections = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        return {name: getattr(submodules, name) for name in (*projections, "q_layernorm", "kv_layernorm")}


class WholeLinear(nn.Module):
    """A projection that each tensor-parallel rank holds. Its gradient is added up over their parts of the sequence."""

    def __init__(self, config: MLATransformerConfig, output_size: int) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        size = (output_size, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        assert config.init_method is not None
        config.init_method(self.weight)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """hidden: [n, 1, E]. Returns [n, 1, O]."""
        return nn.functional.linear(hidden, self.weight), None
