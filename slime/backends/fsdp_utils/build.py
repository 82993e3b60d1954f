"""The models of one rank: loaded, frozen or not, compiled, sharded; and weights copied from one to another."""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from slime.backends.fsdp_utils import checkpoint
from slime.backends.fsdp_utils.arguments import FSDPConfig, check_context_parallel, check_packable
from slime.backends.fsdp_utils.context_parallel import ContextGroup
from slime.backends.fsdp_utils.model import (
    TokenModel,
    compile_each,
    decoder_layers,
    enable_gradient_checkpointing,
    load_causal_lm,
    shard,
    shard_options,
    wants_compilation,
)
from slime.backends.fsdp_utils.optimizer import freeze
from slime.backends.fsdp_utils.routers import attach_routing_replay
from slime.backends.fsdp_utils.sources import Source
from slime.backends.fsdp_utils.value_model import ValueModel, shard_critic
from slime.backends.shared.precision import compute_dtype
from slime.config.run import RunConfig
from slime.training.backend import POLICY, ModelTag

Role = Literal["actor", "critic"]
Model = TokenModel | ValueModel


class Builder(NamedTuple):
    """What models of this rank have in common. role: the one that is trained."""

    run: RunConfig
    fsdp: FSDPConfig
    device: torch.device
    mesh: DeviceMesh
    context: ContextGroup | None
    role: Role

    def load(self, source: Source, tag: ModelTag) -> Model:
        """The model of `source`, as `tag` wants it."""
        lm = load_causal_lm(
            source.directory,
            attn_implementation=self.fsdp.attn_implementation,
            experts_implementation=self.fsdp.experts_implementation,
            trust_remote_code=self.run.trust_remote_code,
        )
        model_config = lm.config.get_text_config().to_dict()
        check_packable(model_config)
        check_context_parallel(self.run.context_parallel_size, self.fsdp, model_config)
        model = self.sharded(lm, tag)
        if source.checkpoint is not None:
            checkpoint.load_model(source.checkpoint, model)
        return model

    def sharded(self, lm: PreTrainedModel, tag: ModelTag) -> Model:
        """`lm` as the model that `tag` wants, on the device; only that of the role is trained."""
        lm.eval()  # no dropout: the policy that is trained must be the one that was sampled
        lm.requires_grad_(tag == self.role)
        if tag == self.role == "actor":
            freeze(lm, self.run)
        if tag == self.role and self.fsdp.gradient_checkpointing:
            enable_gradient_checkpointing(lm)
        layers = decoder_layers(lm)
        replay = None
        if self.run.use_routing_replay and self.role == "actor" and tag in POLICY:
            replay = attach_routing_replay(
                lm, layers, is_recomputed=tag == "actor" and self.fsdp.gradient_checkpointing
            )
        if wants_compilation(self.fsdp.torch_compile, self.device):
            compile_each(layers)
        dtype = compute_dtype(self.run, self.device)
        options = shard_options(self.fsdp, self.mesh, self.device, dtype=dtype)
        reshards = self.fsdp.fsdp_reshard_after_forward
        if tag == "critic":
            critic = ValueModel(lm, share_prompts=self.fsdp.share_prompts, context=self.context)
            shard_critic(critic, layers, options, reshard_after_forward=reshards)
            return critic
        model = TokenModel(
            lm,
            temperature=self.run.rollout_temperature,
            chunk_size=self.run.log_probs_chunk_size,
            share_prompts=self.fsdp.share_prompts,
            context=self.context,
        )
        model.replay = replay
        shard(model, layers, options, reshard_after_forward=reshards)
        return model


@torch.no_grad()
def copy_tensors(source: nn.Module, target: nn.Module, what: str) -> None:
    """Every rank copies its shards. Raises ValueError for models of different shapes."""
    tensors = [dict(itertools.chain(model.named_parameters(), model.named_buffers())) for model in (source, target)]
    shapes = [{name: tuple(tensor.shape) for name, tensor in named.items()} for named in tensors]
    if different := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        ours, theirs = (named.get(different[0], "none") for named in shapes)
        raise ValueError(f"weights cannot be copied from {what}: tensor {different[0]} has shapes {ours} and {theirs}")
    for name, tensor in tensors[1].items():
        tensor.copy_(tensors[0][name])
