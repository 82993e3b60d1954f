"""A decoder layer with norms after attention and after the MLP too (GLM-4). Importing this imports Megatron-core."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class SandwichNormLayer(TransformerLayer):
    """TransformerLayer whose two outputs are normalized before they are added to the residual stream.

    Put it in a layer spec as `spec.module`; the norms are called as SGLang and transformers call them.
    """

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.post_self_attn_layernorm = _norm(config)
        self.post_mlp_layernorm = _norm(config)
        self.self_attention.register_forward_hook(self._after_attention)
        self.mlp.register_forward_hook(self._after_mlp)

    def _after_attention(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return self.post_self_attn_layernorm(output[0]), output[1]

    def _after_mlp(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return self.post_mlp_layernorm(output[0]), output[1]


def _norm(config: Any) -> nn.Module:
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    norm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype, device=device)
    # its gradient is summed over tensor-parallel ranks
    norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
