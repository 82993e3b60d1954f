"""The end of a model: per-token outputs, not logits. Shapes: n tokens, t response tokens of this rank, E width."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from slime.backends.megatron_utils.packing import Inputs
from slime.backends.shared.target_log_probs import LogitRule, VocabShard, chunk_logits, sharded_target_log_probs
from slime.training.backend import TokenOutputs, Wants


class ValueHead(nn.Module):
    """A critic's output layer: what is still to be expected before each response token; of a new critic, 0 everywhere.

    It is told and asked as `TokenHead` is.
    """

    def __init__(self, lm: GPTModel) -> None:
        """Takes the place of the output layer of `lm`."""
        super().__init__()
        config, like = lm.config, lm.output_layer.weight
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=like.device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=config.params_dtype, device=like.device))
        self.is_sequence_parallel = config.sequence_parallel
        self.wanted: tuple[Inputs, Wants] | None = None
        self.outputs: TokenOutputs | None = None
        lm.output_layer = self

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Tensor, None]:
        """hidden: [n, 1, E], of this tensor-parallel rank's n with sequence parallel. Returns values [t, 1]."""
        assert self.wanted is not None
        if self.is_sequence_parallel:  # every rank has the whole gradient
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden_tE = hidden[:, 0].index_select(0, self.wanted[0].predictors).float()
        values = nn.functional.linear(hidden_tE, self.weight.float(), self.bias.float())
        self.outputs = TokenOutputs(torch.zeros_like(values[:, 0]), values=values[:, 0])
        return values, None

    def take(self) -> TokenOutputs:
        """The outputs of the last forward."""
        assert self.outputs is not None
        outputs, self.outputs, self.wanted = self.outputs, None, None
        return outputs


class TokenHead:
    """Takes the place of the output layer's forward, whose weights it reads.

    It is told what is wanted before the model runs and asked for it afterwards: Megatron passes one tensor between.
    """

    def __init__(self, lm: GPTModel, *, vocab_size: int, rule: LogitRule) -> None:
        self.layer = lm.output_layer
        self.vocab_size = vocab_size
        self.rule = rule
        self.is_sequence_parallel = lm.config.sequence_parallel
        self.wanted: tuple[Inputs, Wants] | None = None
        self.outputs: TokenOutputs | None = None
        self.layer.forward = self.forward

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Tensor, None]:
        """hidden: [n, 1, E], of this tensor-parallel rank's n with sequence parallel. Returns log-probs [t, 1]."""
        assert self.wanted is not None
        inputs, wants = self.wanted
        if self.is_sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        hidden_tE = hidden[:, 0].index_select(0, inputs.predictors)
        weight = self.layer.weight if weight is None else weight
        rows_VE, shard = self._own_rows(weight)
        log_probs, entropy = sharded_target_log_probs(
            hidden_tE, rows_VE, inputs.targets, self.rule, entropy=wants.entropy, shard=shard
        )
        logits = self._logits(hidden_tE, rows_VE, len(weight)) if wants.logits else None
        self.outputs = TokenOutputs(log_probs, entropy=entropy, logits=logits)
        return log_probs[:, None], None

    def take(self) -> TokenOutputs:
        """The outputs of the last forward."""
        assert self.outputs is not None
        outputs, self.outputs, self.wanted = self.outputs, None, None
        return outputs

    def _own_rows(self, weight: Tensor) -> tuple[Tensor, VocabShard | None]:
        """Without rows that only pad the vocabulary: they are no tokens."""
        group = parallel_state.get_tensor_model_parallel_group()
        start = parallel_state.get_tensor_model_parallel_rank() * len(weight)
        num_rows = min(len(weight), self.vocab_size - start)
        rows = weight if num_rows == len(weight) else weight[:num_rows]
        return rows, VocabShard(start, group) if group.size() > 1 else None

    def _logits(self, hidden_tE: Tensor, rows_VE: Tensor, num_rows: int) -> Tensor:
        """float32 [t, V]. num_rows: those of every rank's shard, padding included."""
        own = chunk_logits(hidden_tE, rows_VE, None, self.rule)
        padded = torch.nn.functional.pad(own, (0, num_rows - len(rows_VE)))
        gathered: Tensor = gather_from_tensor_model_parallel_region(padded)
        return gathered[:, : self.vocab_size]
