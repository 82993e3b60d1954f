"""The part of a model that this rank holds, and its weights by Megatron's names."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.backends.megatron_utils.layers import apply_router_without_transformer_engine, block_spec
from slime.backends.megatron_utils.names import HFDirectory, ModelShape, ParallelPlace, local_tensor, map_parameter
from slime.backends.megatron_utils.parallel import place_of

Weights = dict[str, Tensor]


class Chunk:
    """The layers of this rank's stage. lm: as built; `wrapped` is what schedules call."""

    def __init__(self, lm: GPTModel, place: ParallelPlace) -> None:
        self.lm = lm
        self.place = place
        self.wrapped: Any = lm

    def weights(self) -> Weights:
        """Parameters and buffers by Megatron's name, in place."""
        state: dict[str, Any] = self.lm.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def build_chunk(
    config: TransformerConfig,
    shape: ModelShape,
    options: dict[str, Any],
    *,
    transformer_engine: bool,
    device: torch.device,
) -> Chunk:
    """This rank's stage, with random weights. options: `transformer.model_options`."""
    apply_router_without_transformer_engine()
    lm = GPTModel(
        config,
        block_spec(config, transformer_engine=transformer_engine, sandwich_norms=shape.sandwich_norms),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **options,
    ).to(device)
    layers = [layer.layer_number - 1 for layer in lm.decoder.layers]
    return Chunk(lm, place_of(layers, options["vocab_size"]))


@torch.no_grad()
def read_weights(chunk: Chunk, shape: ModelShape, checkpoint: HFDirectory, *, but_for: str | None = None) -> Weights:
    """This rank's weights out of a Hugging Face directory, on the host; only what it holds is read.

    but_for: the start of names that are none of the directory's.
    """
    return {
        name: local_tensor(map_parameter(shape, chunk.place, name), checkpoint.read).to(tensor.dtype)
        for name, tensor in chunk.weights().items()
        if but_for is None or not name.startswith(but_for)
    }


@torch.no_grad()
def copy_into(chunk: Chunk, weights: Weights) -> None:
    """Overwrite the chunk's weights of these names."""
    own = chunk.weights()
    for name, tensor in weights.items():
        own[name].copy_(tensor, non_blocking=True)


def host_copy(chunk: Chunk) -> Weights:
    """A copy of the chunk's weights on the host, page-locked where they lie on a GPU."""
    return {name: _on_host(tensor.detach()) for name, tensor in chunk.weights().items()}


def _on_host(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor)
