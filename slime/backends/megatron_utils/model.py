"""The part of a model that this rank holds, and its weights by Megatron's names."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from slime.backends.megatron_utils.attention import has_packed_attention
from slime.backends.megatron_utils.layers import apply_without_transformer_engine, block_spec
from slime.backends.megatron_utils.names import ModelShape, ParallelPlace, fill_local, map_parameter
from slime.backends.megatron_utils.names.mapping import Read
from slime.backends.megatron_utils.parallel import place_of
from slime.backends.megatron_utils.provider import check_provided, provided_model
from slime.backends.megatron_utils.rotary import take_rotation

Weights = dict[str, Tensor]
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..+)")


class Chunk:
    """The layers of this rank: of its stage, or of its virtual stages in turn.

    lms: each stage as built; `wrapped` is what schedules call.
    """

    def __init__(self, lms: list[GPTModel], place: ParallelPlace) -> None:
        self.lms = lms
        self.place = place
        self.wrapped: list[Any] = list(lms)

    def weights(self) -> Weights:
        """Parameters and buffers by Megatron's name, with layers counted over the whole model, in place."""
        return {
            _global_name(lm, name): value
            for lm in self.lms
            for name, value in lm.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor)
        }


def named(lms: list[GPTModel], values: list[Any]) -> dict[str, Any]:
    """A value of each stage under the name that Megatron gives the stage in checkpoints."""
    names = ["model"] if len(lms) == 1 else [f"model{number}" for number in range(len(lms))]
    return dict(zip(names, values, strict=True))


def _global_name(lm: GPTModel, name: str) -> str:
    match = _LAYER.fullmatch(name)
    return name if match is None else f"{match[1]}{lm.decoder.layers[int(match[2])].layer_number - 1}{match[3]}"


def build_chunk(
    config: TransformerConfig,
    shape: ModelShape,
    options: dict[str, Any],
    *,
    transformer_engine: bool,
    compiled: bool = False,
    device: torch.device,
    provider_path: str | None = None,
) -> Chunk:
    """This rank's stages, with random weights. options: `transformer.model_options`. compiled: see `can_compile`.

    provider_path: of the user's function that makes each. Raises ValueError where that is not the model of `shape`.
    """
    apply_without_transformer_engine()
    make = GPTModel if provider_path is None else partial(provided_model, provider_path)
    count = config.virtual_pipeline_model_parallel_size
    lms = []
    for stage in [None] if count is None else range(count):
        spec = block_spec(
            config,
            transformer_engine=transformer_engine,
            sandwich_norms=shape.sandwich_norms,
            compiled=compiled,
            vp_stage=stage,
        )
        lm = make(
            config=config,
            transformer_layer_spec=spec,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
            **options,
        ).to(device)
        has_own_kernels = transformer_engine or config.multi_latent_attention
        if not has_own_kernels and all(map(has_packed_attention, lm.decoder.layers)):
            take_rotation(lm)
        lms.append(lm)
    chunk = Chunk(lms, place_of(range(shape.num_layers), options["vocab_size"]))
    if provider_path is not None:
        check_provided(provider_path, chunk.weights(), shape, chunk.place)
    return chunk


@torch.no_grad()
def read_weights(chunk: Chunk, shape: ModelShape, read: Read, *, but_for: str | None = None) -> None:
    """Overwrite the chunk's weights out of tensors under Hugging Face names; only what this rank holds is read.

    read: `HFDirectory.read`. but_for: the start of names that are not among them.
    """
    for name, tensor in chunk.weights().items():
        if but_for is None or not name.startswith(but_for):
            fill_local(map_parameter(shape, chunk.place, name), read, tensor)


@torch.no_grad()
def copy_into(chunk: Chunk, weights: Weights) -> None:
    """Overwrite the chunk's weights of these names."""
    own = chunk.weights()
    for name, tensor in weights.items():
        own[name].copy_(tensor, non_blocking=True)


def in_half_precision(config: TransformerConfig, lm: GPTModel) -> nn.Module:
    """`lm`, in place, in the half precision that the configuration says, but for the corrections that routers add to
    scores: they stay float32, as in checkpoints, since a bias that is rounded chooses other experts.
    """
    corrections = {
        module: module.expert_bias for module in lm.modules() if getattr(module, "expert_bias", None) is not None
    }
    half: nn.Module = Float16Module(config, lm)
    for router, correction in corrections.items():
        router.expert_bias = correction
    return half


def host_copy(chunk: Chunk) -> Weights:
    """A copy of the chunk's weights on the host, page-locked where they lie on a GPU."""
    return {name: _on_host(tensor.detach()) for name, tensor in chunk.weights().items()}


def _on_host(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor)
