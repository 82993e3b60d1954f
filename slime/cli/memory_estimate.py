"""How much memory a run will roughly take, from the shape of its model. Bytes throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_FP32 = 4
_MASTER_BYTES = 4 * _FP32  # weight, gradient, two moments of Adam


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a decoder that memory depends on."""

    num_parameters: int
    num_layers: int
    width: int
    vocabulary: int
    kv_width: int  # of keys of one token in one layer

    @classmethod
    def from_config(cls, config: dict[str, Any], num_parameters: int) -> ModelSize:
        """From config.json. Raises KeyError for an architecture that names its numbers otherwise."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            num_parameters,
            config["num_hidden_layers"],
            config["hidden_size"],
            config["vocab_size"],
            (config.get("num_key_value_heads") or heads) * head_dim,
        )


@dataclass(frozen=True)
class TrainingLoad:
    """What one trainer rank holds at a time. compute_bytes: of one activation (4 in float32, 2 in bfloat16)."""

    num_ranks: int
    micro_batch_tokens: int
    logit_chunk_tokens: int
    compute_bytes: int
    num_frozen: int  # copies of the weights beside the actor's: reference, teacher, old actor
    recomputes: bool
    num_critic_ranks: int = 0  # that share the actor's slots


def trainer_memory(model: ModelSize, load: TrainingLoad) -> dict[str, int]:
    """Bytes on one rank by kind, for fully sharded float32 states.

    Activations: some 17 values of model width a token and layer, one with recomputation; logits of one chunk and their
    gradient in float32.
    """
    shard = model.num_parameters // load.num_ranks
    tokens_by_width = load.micro_batch_tokens * model.width * load.compute_bytes
    values_per_layer = 1 if load.recomputes else 17
    return {
        "weights, gradients, Adam": shard * _MASTER_BYTES,
        "critic": model.num_parameters // load.num_critic_ranks * _MASTER_BYTES if load.num_critic_ranks else 0,
        "frozen models": shard * _FP32 * load.num_frozen,
        "one layer, gathered": model.num_parameters // max(1, model.num_layers) * load.compute_bytes,
        "activations": tokens_by_width * (model.num_layers * values_per_layer + 17),
        "logits": 2 * min(load.logit_chunk_tokens, load.micro_batch_tokens) * model.vocabulary * _FP32,
    }


def kv_bytes_per_token(model: ModelSize, value_bytes: int) -> int:
    """Keys and values of one token in all layers of an engine."""
    return 2 * model.num_layers * model.kv_width * value_bytes
