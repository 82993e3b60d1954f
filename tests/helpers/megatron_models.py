"""Real Megatron-core models of a ModelShape, on the CPU, with the weights of an HF directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from slime.backends.megatron_utils.model_arguments import gpt_model_options, transformer_config_fields
from slime.backends.megatron_utils.names import HFDirectory, ModelShape, ParallelPlace, local_tensor, map_parameter


@contextmanager
def megatron_world(rank: int = 0, size: int = 1, *, store: Any = None, **parallel: int) -> Iterator[None]:
    """Process group (one that is there stays) and Megatron's parallel state; under `megatron_on_cpu()`.

    parallel: as initialize_model_parallel.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    is_own = not dist.is_initialized()
    if is_own:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store or dist.HashStore(),
            rank=rank,
            world_size=size,
        )
    try:
        parallel_state.initialize_model_parallel(**parallel)
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if is_own:
            dist.destroy_process_group()


def build_gpt(
    shape: ModelShape, *, dtype: torch.dtype = torch.float32, transformer_engine: bool = False, **config_fields: Any
) -> torch.nn.Module:
    """This rank's part of the model, with random weights: local layers, or Transformer Engine's on a GPU."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    fields = transformer_config_fields(shape) | {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "use_cpu_initialization": not transformer_engine,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }
    config = (TransformerConfig if shape.mla is None else MLATransformerConfig)(**fields | config_fields)
    _mend_megatron()
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=transformer_engine, normalization="RMSNorm")
    if shape.sandwich_norms:
        from slime.backends.megatron_utils.sandwich_norms import SandwichNormLayer

        for layer in spec.layer_specs:
            layer.module = SandwichNormLayer
    if shape.mla is not None and not transformer_engine:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = CausalAttention
    with pytest.MonkeyPatch.context() as patch:
        if not transformer_engine:
            patch.setattr(torch.cuda, "current_device", lambda: "cpu")  # YaRN makes a torch.device of it
        model = GPTModel(
            config,
            spec,
            vocab_size=padded_vocab_size(shape),
            max_sequence_length=256,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=False,
            **gpt_model_options(shape),
        )
    if dtype is torch.bfloat16:
        model = Float16Module(config, model).module  # the norms too
    return model.eval()


class CausalAttention(torch.nn.Module):
    """Core attention with keys and values of different sizes, which the local spec's own refuses."""

    def __init__(self, *, softmax_scale: float, **options: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> Any:
        """All [positions, batch, heads, size]; returns [positions, batch, heads x value size]."""
        parts = [part.permute(1, 2, 0, 3) for part in (query, key, value)]
        output = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=self.scale)
        return output.permute(2, 0, 1, 3).flatten(2)


def _mend_megatron() -> None:
    """megatron-core 0.16.1 without Transformer Engine: its router asks for a name that is not defined then, and latent
    attention believes it there."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE


def padded_vocab_size(shape: ModelShape) -> int:
    """Megatron's own: a multiple of 128."""
    return -(-shape.vocab_size // 128) * 128


def place_here(shape: ModelShape, *, transformer_engine: bool = False) -> ParallelPlace:
    """This process's place, with its layers split evenly among stages."""
    from megatron.core import parallel_state as state

    per_stage = shape.num_layers // state.get_pipeline_model_parallel_world_size()
    first = per_stage * state.get_pipeline_model_parallel_rank()
    return ParallelPlace(
        layers=range(first, first + per_stage),
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp_size=state.get_tensor_model_parallel_world_size(),
        ep_rank=state.get_expert_model_parallel_rank(),
        ep_size=state.get_expert_model_parallel_world_size(),
        etp_rank=state.get_expert_tensor_parallel_rank(),
        etp_size=state.get_expert_tensor_parallel_world_size(),
        padded_vocab_size=padded_vocab_size(shape),
        shards_down_projections=not transformer_engine,
    )


def load_hf(
    model: torch.nn.Module, shape: ModelShape, source: HFDirectory, *, transformer_engine: bool = False
) -> None:
    """Fill every parameter through the name map."""
    place = place_here(shape, transformer_engine=transformer_engine)
    with torch.no_grad():
        for name, parameter in model.state_dict(keep_vars=True).items():
            if not name.endswith("_extra_state"):
                parameter.copy_(local_tensor(map_parameter(shape, place, name), source.read))


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, positions, padded vocabulary]."""
    length = tokens.shape[1]
    mask = torch.ones(length, length).triu(1).bool()[None, None]
    return model(tokens, torch.arange(length).expand_as(tokens), mask)
