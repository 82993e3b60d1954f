"""A critic: the decoder of any Hugging Face causal LM under a linear head. Shapes: T response
tokens, O of them this rank's, E model width."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from slime.backends.fsdp_utils.context_parallel import ContextGroup
from slime.backends.fsdp_utils.model import ShardOptions, shard, target_outputs
from slime.data.packed import PackedBatch
from slime.training.backend import TokenOutputs, Wants


class ValueModel(nn.Module):
    """What is still to be expected before each response token of a packed batch; of a new critic, 0 everywhere."""

    def __init__(self, lm: PreTrainedModel, *, share_prompts: bool = True, context: ContextGroup | None = None) -> None:
        """Takes the decoder of `lm` and leaves its own head. share_prompts, context: as a `TokenModel`'s."""
        super().__init__()
        self.decoder = cast(nn.Module, lm.get_decoder())
        self.share_prompts = share_prompts
        self.context = context
        width = lm.config.get_text_config().hidden_size
        self.head = nn.utils.skip_init(nn.Linear, width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: PackedBatch, wants: Wants) -> TokenOutputs:
        """Values [T] for `batch`, which lies on the model's device; there is nothing else to want."""
        return target_outputs(self.decoder, batch, self._head, share_prompts=self.share_prompts, context=self.context)

    def _head(self, hidden_O: Tensor, targets_O: Tensor) -> TokenOutputs:
        values_O = self.head(hidden_O.float()).squeeze(-1).clone()  # no view: FSDP hangs its hooks on outputs
        return TokenOutputs(torch.zeros_like(values_O), values=values_O)


def shard_critic(
    model: ValueModel, layers: list[nn.Module], options: ShardOptions, *, reshard_after_forward: bool
) -> None:
    """FSDP2, in place. The head is small and its output is regressed on: it computes in float32."""
    fully_shard(model.head, **options.float32()._asdict())
    shard(model, layers, options, reshard_after_forward=reshard_after_forward)
