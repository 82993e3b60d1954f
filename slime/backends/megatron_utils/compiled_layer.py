"""A decoder layer whose parts before and after attention are compiled, each into few kernels that keep little.

Shapes: n tokens, E width, H query heads in K groups, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from slime.backends.megatron_utils.packing import Packing
from slime.backends.megatron_utils.rotary import Rotation, rotate


def can_compile(config: TransformerConfig, ddp: DistributedDataParallelConfig) -> bool:
    """Whether slime's layers on torch are such as `CompiledLayer` computes, and nothing hooks into their modules."""
    return not (
        config.num_moe_experts
        or config.multi_latent_attention
        or config.tensor_model_parallel_size > 1
        or config.recompute_granularity == "selective"
        or config.hidden_dropout
        or ddp.overlap_param_gather
    )


class CompiledLayer(TransformerLayer):
    """TransformerLayer with the same parameters: norms, attention and a gated MLP, on one tensor-parallel rank.

    It reads the weights of Megatron's modules and does not call them: the compiler cannot follow all they do.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.to_heads = torch.compile(self._to_heads, dynamic=True)
        self.from_heads = torch.compile(self._from_heads, dynamic=True)

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        """hidden_states: [n, 1, E]. Returns the same shape, and no context."""
        packing = options["packed_seq_params"]
        assert isinstance(packing, Packing)
        assert packing.rotation is not None
        heads = self.to_heads(hidden_states[:, 0], packing.rotation)
        attended = self.self_attention.core_attention(*heads, None, packed_seq_params=packing, is_rotated=True)
        return self.from_heads(attended[:, None], hidden_states), None

    def _to_heads(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """hidden: [n, E]. Returns queries [n, H, D], keys and values [n, K, D]."""
        attention = self.self_attention
        mixed = _linear(self.input_layernorm(hidden), attention.linear_qkv)
        grouped = mixed.unflatten(-1, (self.config.num_query_groups, -1, self.config.kv_channels))
        query, key, value = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
        if self.config.qk_layernorm:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        return rotate(query, rotation), rotate(key, rotation), value.contiguous()

    def _from_heads(self, attended: Tensor, residual: Tensor) -> Tensor:
        """attended: [n, 1, H * D]. residual: [n, 1, E], as the result: no view, since schedules free its memory."""
        hidden = residual + _linear(attended, self.self_attention.linear_proj)
        gate, up = _linear(self.pre_mlp_layernorm(hidden), self.mlp.linear_fc1).chunk(2, dim=-1)
        return hidden + _linear(F.silu(gate) * up, self.mlp.linear_fc2)


def _linear(hidden: Tensor, module: Any) -> Tensor:
    return F.linear(hidden, module.weight, module.bias)
