"""How much memory a run will take, from the shape of its model. Bytes throughout.

Activations: what a layer keeps for its backward, a token, with c bytes a value of the compute type, width E, query
width Q = heads x head width, key width K, MLP width F. Torch's own bookkeeping of saved tensors has the same counts,
byte for byte (tests/cli/test_memory_estimate.py).

    each norm over the width     its input in float32 (4 E; compiled: as it came, c E), 1/rms (4); then what it scales
                                 (c E; compiled: computed again), and its result, which the next products need (c E)
    norms of queries and keys    the same but for the result: (4 + c)(Q + K), compiled c (Q + K), 4 a head
    attention                    queries, keys, values, result: c (2 Q + 2 K), log of the normaliser: 4 a head
    latent attention             norms of the low ranks as those over the width; queries and keys; values and result,
                                 with zeros up to the width of queries where values are narrower, the result without
                                 them too; a float32 or compiled norm of keys and values keeps the rotary part beside
    gated MLP                    gate, its activation, up, their product: 4 c F, compiled 3 c F (the activation is
                                 computed again)
    mixture of experts           for each of the chosen experts what comes in and goes out, gate and up, activation and
                                 product: c (2 E + 4 F), and the choice itself

With recomputation a layer keeps its input alone, c E, and has the rest while its own backward runs.

FSDP2 holds this rank's share of weights, gradients and Adam's two moments in float32, the embeddings and the head whole
in the compute type, and two layers whole (one works, the next is gathered). Weights that are gathered, logits of a
chunk, and gradients on their way to float32 come and go: `training_moments` adds up the three moments at which a peak
can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

_FP32 = 4
_STATE_BYTES = 3 * _FP32  # weight, two moments of Adam
_INT64 = 8
_KERNEL_UNIT = 8  # of widths of heads, see slime.backends.shared.varlen
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Latent(NamedTuple):
    """Widths of latent attention. q_rank: 0 where queries have no low rank. rope: the part of a key that turns."""

    q_rank: int
    kv_rank: int
    rope: int
    values: int


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a decoder that memory depends on.

    num_root: parameters outside of the layers. num_norms: of model width in a layer. num_chosen: experts of a token, 0
    in a dense model; expert_width: F of one expert. head_width: of queries and keys.
    """

    num_parameters: int
    num_root: int
    num_layers: int
    width: int
    vocabulary: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    num_norms: int
    has_query_norms: bool
    num_experts: int = 0
    num_chosen: int = 0
    expert_width: int = 0
    latent: Latent | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any], counts: Counts) -> ModelSize:
        """From config.json. Raises KeyError for an architecture that names its numbers otherwise."""
        config = config.get("text_config", config)
        heads = config["num_attention_heads"]
        latent = _latent(config) if config.get("kv_lora_rank") else None
        head_width = config.get("head_dim") or config["hidden_size"] // heads
        num_experts = next((config[key] for key in _EXPERT_COUNTS if config.get(key)), 0)
        shared = config.get("n_shared_experts") or 0
        return cls(
            **counts._asdict(),
            num_layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            vocabulary=config["vocab_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config["qk_nope_head_dim"] + latent.rope if latent else head_width,
            latent=latent,
            mlp_width=config["intermediate_size"],
            num_experts=num_experts,
            num_chosen=config["num_experts_per_tok"] + shared if num_experts else 0,
            expert_width=config.get("moe_intermediate_size") or config["intermediate_size"],
        )

    @property
    def layer_parameters(self) -> int:
        """Of one layer, the mean."""
        return (self.num_parameters - self.num_root) // self.num_layers


def _latent(config: dict[str, Any]) -> Latent:
    sizes = (config["kv_lora_rank"], config["qk_rope_head_dim"], config["v_head_dim"])
    return Latent(config.get("q_lora_rank") or 0, *sizes)


class Counts(NamedTuple):
    """What is counted in the model itself, see ModelSize."""

    num_parameters: int
    num_root: int
    num_norms: int
    has_query_norms: bool


@dataclass(frozen=True)
class TrainingLoad:
    """What one trainer rank holds at a time. compute_bytes: of one activation (4 in float32, 2 in half precision).

    num_frozen: copies of the weights beside the actor's: reference, teacher, old actor. num_critic_ranks: that share
    the actor's slots. accumulates: several micro-batches a step, so that gradients are there from the start.
    keeps_layers: weights that were gathered stay until the backward. offloads_states: weights, gradients and Adam are
    on the host. parks_frozen: the frozen models are.
    """

    num_ranks: int
    micro_batch_tokens: int
    logit_chunk_tokens: int
    compute_bytes: int
    num_frozen: int = 0
    recomputes: bool = False
    is_compiled: bool = False
    accumulates: bool = False
    keeps_layers: bool = False
    offloads_states: bool = False
    parks_frozen: bool = False
    num_critic_ranks: int = 0


def layer_activation_bytes(model: ModelSize, *, compute_bytes: int, is_compiled: bool) -> int:
    """What a layer keeps of one token for its backward; the module's docstring has the derivation."""
    c = compute_bytes
    queries, keys = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    norms = model.num_norms * (model.width * (2 * c if is_compiled else _FP32 + 2 * c) + _FP32)
    if model.latent is not None:
        attention = _latent_attention_bytes(model, model.latent, c, is_compiled=is_compiled)
        return norms + attention + _mlp_bytes(model, c, is_compiled=is_compiled)
    if model.has_query_norms:
        norms += (queries + keys) * (c if is_compiled else _FP32 + c) + _FP32 * (model.num_heads + model.num_kv_heads)
    attention = c * 2 * (queries + keys) + _FP32 * model.num_heads
    return norms + attention + _mlp_bytes(model, c, is_compiled=is_compiled)


def _latent_attention_bytes(model: ModelSize, latent: Latent, c: int, *, is_compiled: bool) -> int:
    ranks = [latent.q_rank, latent.kv_rank] if latent.q_rank else [latent.kv_rank]
    norms = sum(rank * (2 * c if is_compiled else _FP32 + 2 * c) + _FP32 for rank in ranks)
    is_view_kept = is_compiled or c == _FP32  # what the norm of keys and values keeps has the rotary part beside it
    width = _KERNEL_UNIT * -(-max(model.head_width, latent.values) // _KERNEL_UNIT)
    values_and_result = 2 * width + (latent.values if width > latent.values else 0)
    heads = c * model.num_heads * (2 * width + values_and_result) + _FP32 * model.num_heads
    return norms + (c * latent.rope if is_view_kept else 0) + heads


def _mlp_bytes(model: ModelSize, c: int, *, is_compiled: bool) -> int:
    if not model.num_chosen:
        return (3 if is_compiled else 4) * c * model.mlp_width
    experts = c * (2 * model.width + 4 * model.expert_width)
    choice = 4 * _INT64 + _FP32 + 1 + c  # of one expert: its place before and after sorting, its weight
    return model.num_chosen * (experts + choice) + _FP32 * (model.num_experts + 1)


def training_moments(model: ModelSize, load: TrainingLoad) -> list[dict[str, int]]:
    """Bytes on one rank by kind: as the backward begins, in its last layer, and as gradients of the rest are added."""
    c, tokens = load.compute_bytes, load.micro_batch_tokens
    states = {name: 0 if _is_on_host(name, load) else value for name, value in _states(model, load).items()}
    layer = tokens * layer_activation_bytes(model, compute_bytes=c, is_compiled=load.is_compiled)
    kept = tokens * model.width * c if load.recomputes else layer
    at_work = (layer if load.recomputes else 0) + tokens * 3 * c * _widest(model)  # gradients of the MLP's products
    gathered = c * model.num_root + 2 * c * model.layer_parameters
    gathered_at_first = c * model.num_parameters if load.keeps_layers else gathered
    logits = min(load.logit_chunk_tokens, tokens) * model.vocabulary * (2 * _FP32 + c % _FP32)
    head = c * model.vocabulary * model.width  # its gradient
    last_norm = tokens * model.width * (_FP32 + 5 * c)
    share, root_share = (_FP32 * n // load.num_ranks for n in (model.num_parameters, model.num_root))
    share, root_share = (0, 0) if load.offloads_states else (share, root_share)
    begin = {
        "gradients": head + (share if load.accumulates else 0),
        "gathered": gathered_at_first,
        "activations": model.num_layers * kept + last_norm + max(at_work, logits),
    }
    last_layer = {
        "gradients": head + (share if load.accumulates else share - root_share),
        "gathered": gathered,
        "activations": layer + tokens * 3 * c * _widest(model),
    }
    end = {"gradients": share + (c + _FP32) * model.num_root, "gathered": c * model.num_root}
    return [states | moment for moment in (begin, last_layer, end)]


def training_peak(model: ModelSize, load: TrainingLoad) -> dict[str, int]:
    """Bytes by kind on one rank at the moment that takes most."""
    return max(training_moments(model, load), key=lambda moment: sum(moment.values()))


def _widest(model: ModelSize) -> int:
    return max(model.num_chosen * model.expert_width, 0 if model.num_chosen else model.mlp_width)


def _is_on_host(kind: str, load: TrainingLoad) -> bool:
    return load.offloads_states or (kind == "frozen models" and load.parks_frozen)


def _states(model: ModelSize, load: TrainingLoad) -> dict[str, int]:
    """What stays between steps."""
    n = model.num_parameters
    return {
        "weights and Adam": _STATE_BYTES * n // load.num_ranks,
        "critic": _STATE_BYTES * n // load.num_critic_ranks if load.num_critic_ranks else 0,
        "frozen models": _FP32 * n // load.num_ranks * load.num_frozen,
    }


def asleep_bytes(model: ModelSize, load: TrainingLoad) -> int:
    """What a trainer that sleeps has in page-locked host memory."""
    return sum(_states(model, load).values())


def kv_bytes_per_token(model: ModelSize, value_bytes: int, *, of_latents: bool = False) -> int:
    """Keys and values of one token in all layers of an engine.

    of_latents: with latent attention it keeps what they are made of, as SGLang does.
    """
    if model.latent is not None and of_latents:
        return model.num_layers * (model.latent.kv_rank + model.latent.rope) * value_bytes
    return 2 * model.num_layers * model.num_kv_heads * model.head_width * value_bytes
