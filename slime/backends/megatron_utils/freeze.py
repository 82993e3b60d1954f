"""Parameters that are not trained: without gradients and optimizer state, saved and sent as others are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slime.backends.megatron_utils.model import Chunk
from slime.backends.megatron_utils.names import ModelShape, all_parameters, map_parameter
from slime.backends.shared.trained_parameters import trained_names
from slime.config import OptimizerConfig


def freeze(chunk: Chunk, shape: ModelShape, cfg: OptimizerConfig) -> None:
    """Take the parameters that the settings leave out from training, before the model is wrapped.

    Patterns are looked for in names of the whole model, the same on every rank: Megatron's, with layers and experts
    counted over all ranks, and those of the Hugging Face tensors. Raises ValueError where none is meant.
    """
    whole = [mapped for mapped in all_parameters(shape) if not mapped.is_copy]
    trained = trained_names({mapped.name: tuple(name for name, _ in mapped.hf) for mapped in whole}, cfg)
    trained_hf = {name for mapped in whole if mapped.name in trained for name, _ in mapped.hf}
    for name, weight in chunk.weights().items():
        if isinstance(weight, nn.Parameter):  # of tied weights both copies
            weight.requires_grad_(map_parameter(shape, chunk.place, name).hf[0].name in trained_hf)
    embedding: nn.Module | None = getattr(chunk.lms[0], "embedding", None)
    if embedding is None or chunk.lms[0].config.recompute_granularity is None:
        return
    if not any(parameter.requires_grad for parameter in embedding.parameters()):
        embedding.register_forward_hook(_as_if_trained)


def _as_if_trained(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Megatron's recomputation gives a layer gradients only where what comes in wants some."""
    return output.requires_grad_() if torch.is_grad_enabled() else output
