"""How much memory a rank of Megatron takes. Bytes throughout, of the pipeline stage that takes most.

weights        the rank's share in the compute type: matrices and embeddings split among tensor-parallel ranks (experts
               among expert-parallel and expert-tensor-parallel ones), norms, biases, routers and down projections of
               latent attention whole, corrections of routers in float32; the vocabulary padded to what ranks need
gradients      of what is trained, in float32 (--no-accumulate-allreduce-grads-in-fp32: the compute type)
optimizer      float32 moments (SGD: momentum), in half precision float32 weights too; --use-distributed-optimizer
               shares them among the data-parallel ranks, experts' among those that hold the same experts;
               --optimizer-cpu-offload has moments on the host, but for the waves of a step, which are not counted
activations    a layer keeps as `memory_estimate` says of compiled ones (SwiGLU is fused), and the whole product of
               queries, keys and values, of which the values are a part (latent attention: cosines and sines); heads
               and MLP are split among tensor-parallel
               ranks, residuals and norms too with --sequence-parallel. With full recomputation a unit
               of layers keeps its input, and has the rest while its backward runs. Pipeline stage p of P keeps those
               of P - p micro-batches. Not counted: buffers of communication, padding of gradient buffers, logits of
               the last stage beyond one chunk. Selective recomputation counts as none.

Frozen models are on the host: a copy of the rank's weights each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from slime.arguments import Args
from slime.backends.megatron_utils.names import Mapped, ModelShape, all_parameters
from slime.backends.megatron_utils.stages import layers_of_ranks
from slime.backends.shared.trained_parameters import trained_names
from slime.cli.memory_estimate import Latent, ModelSize, TrainingLoad, layer_activation_bytes

_FP32 = 4
_ADAM = 2 * _FP32


class Count(NamedTuple):
    """Values of one rank. dense: all but those of experts."""

    dense: int = 0
    expert: int = 0

    @property
    def both(self) -> int:
        """Together."""
        return self.dense + self.expert


@dataclass(frozen=True)
class Stage:
    """What a rank of a pipeline stage holds."""

    number: int
    num_layers: int
    held: Count
    trained: Count
    corrections: int  # of routers, held in float32


def stages(shape: ModelShape, args: Args) -> list[Stage]:
    """The pipeline's stages, each of consecutive layers. Raises ValueError where layers cannot be shared so."""
    tensor = args.tensor_model_parallel_size
    padded = math.ceil(shape.vocab_size / tensor) * tensor
    whole = list(all_parameters(shape, padded_vocab_size=padded))
    parts = {mapped.name: tuple(name for name, _ in mapped.hf) for mapped in whole if not mapped.is_copy}
    trained = trained_names(parts, args)
    found, start = [], 0
    for number, num_layers in enumerate(layers_of_ranks(args, shape.num_layers)):
        layers = range(start, start := start + num_layers)
        own = [mapped for mapped in whole if _is_on(mapped, number, layers, args.pipeline_model_parallel_size)]
        fixed = [mapped for mapped in own if mapped.name.endswith("expert_bias")]
        moving = [mapped for mapped in own if _source(mapped) in trained and not mapped.name.endswith("expert_bias")]
        found.append(Stage(number, num_layers, _count(own, args), _count(moving, args), _count(fixed, args).dense))
    return found


def _is_on(mapped: Mapped, number: int, layers: range, num_stages: int) -> bool:
    if mapped.name.startswith("embedding."):
        return number == 0
    if mapped.name.startswith("decoder.layers."):
        return int(mapped.name.split(".")[2]) in layers
    is_second_copy = mapped.is_copy and num_stages == 1  # tied weights of one stage are one parameter
    return number == num_stages - 1 and not is_second_copy


def _source(mapped: Mapped) -> str:
    return "embedding.word_embeddings.weight" if mapped.is_copy else mapped.name


def _count(parameters: list[Mapped], args: Args) -> Count:
    dense = experts = 0
    for mapped in parameters:
        numel, is_sharded = math.prod(mapped.whole().local_shape(0)), mapped.layout.is_sharded
        if ".local_experts." in mapped.name:
            experts += numel // (_expert_tensor(args) if is_sharded else 1)
        else:
            dense += numel // (args.tensor_model_parallel_size if is_sharded else 1)
    return Count(dense, experts // args.expert_model_parallel_size)


def _expert_tensor(args: Args) -> int:
    return args.expert_tensor_parallel_size or args.tensor_model_parallel_size


def states(stage: Stage, args: Args, *, compute_bytes: int, num_ranks: int) -> dict[str, int]:
    """What a rank has between steps, by kind. num_ranks: of the model, the actor's or the critic's."""
    values = _optimizer_values(stage, args, num_ranks)
    moments = _FP32 * values if args.optimizer == "sgd" else _ADAM * values - on_host(stage, args, num_ranks=num_ranks)
    return {
        "weights": compute_bytes * stage.held.both + (_FP32 - compute_bytes) * stage.corrections,
        "gradients": (_FP32 if args.accumulate_allreduce_grads_in_fp32 else compute_bytes) * stage.trained.both,
        "optimizer": moments + (_FP32 * values if compute_bytes < _FP32 else 0),
    }


def on_host(stage: Stage, args: Args, *, num_ranks: int) -> int:
    """Moments of a rank that --optimizer-cpu-offload keeps there."""
    return round(_ADAM * _optimizer_values(stage, args, num_ranks) * args.host_share)


def _optimizer_values(stage: Stage, args: Args, num_ranks: int) -> int:
    """Those that a rank updates."""
    if not args.use_distributed_optimizer:
        return stage.trained.both
    pipeline = args.pipeline_model_parallel_size
    dense_ranks = num_ranks // (args.tensor_model_parallel_size * pipeline)
    expert_ranks = num_ranks // (args.expert_model_parallel_size * _expert_tensor(args) * pipeline)
    return stage.trained.dense // dense_ranks + stage.trained.expert // expert_ranks


def activations(model: ModelSize, stage: Stage, args: Args, load: TrainingLoad) -> int:
    """What a rank keeps of its micro-batches when its first backward begins, and what that one takes."""
    c, tokens, tensor = load.compute_bytes, load.micro_batch_tokens, args.tensor_model_parallel_size
    sequence = tensor if args.sequence_parallel else 1
    width = model.width // sequence
    share = replace(
        model,
        width=width,
        latent=None if model.latent is None else _of_tokens(model.latent, sequence),
        num_heads=max(1, model.num_heads // tensor),
        num_kv_heads=max(1, model.num_kv_heads // tensor),
        mlp_width=model.mlp_width // tensor,
        expert_width=model.expert_width // _expert_tensor(args),
    )
    layer = tokens * (layer_activation_bytes(share, compute_bytes=c, is_compiled=True) + c * _values_of_megatron(share))
    count, unit = stage.num_layers, args.recompute_num_layers or 1
    kept, at_work = count * layer, 0
    if args.recompute_granularity == "full" and args.recompute_method == "block":
        kept, at_work = min(unit, count) * tokens * width * c + max(0, count - unit) * layer, layer
    elif args.recompute_granularity == "full":
        kept, at_work = -(-count // unit) * tokens * width * c, min(unit, count) * layer
    in_flight = args.pipeline_model_parallel_size - stage.number if load.accumulates else 1
    is_last = stage.number == args.pipeline_model_parallel_size - 1
    logits = min(load.logit_chunk_tokens, tokens) * -(-model.vocabulary // tensor) * (2 * _FP32 + c % _FP32)
    last_norm = tokens * (c * width + _FP32)
    return in_flight * kept + max(at_work, logits if is_last else 0) + (last_norm if is_last else 0)


def _of_tokens(latent: Latent, sequence: int) -> Latent:
    """With what comes before heads for a part of the tokens alone."""
    q_rank, kv_rank, rope, values = latent
    return Latent(q_rank // sequence, kv_rank // sequence, rope // sequence, values)


def _values_of_megatron(share: ModelSize) -> int:
    """Of the product of queries, keys and values, what stays because the values, a part of it, are needed; with latent
    attention cosines and sines for queries and for keys."""
    if share.latent is not None:
        return 4 * share.latent.rope
    queries, keys = share.num_heads * share.head_width, share.num_kv_heads * share.head_width
    return queries if share.has_query_norms else queries + keys


class Estimate(NamedTuple):
    """parts: bytes on the GPU by kind, at the peak. The others are on the host: asleep while engines have the GPU."""

    parts: dict[str, int]
    asleep: int
    frozen: int
    moments: int = 0


def estimate(shape: ModelShape, model: ModelSize, args: Args, load: TrainingLoad) -> Estimate:
    """Of the rank that takes most."""
    found = [_of_stage(stage, model, args, load) for stage in stages(shape, args)]
    return max(found, key=lambda one: sum(one.parts.values()))


def _of_stage(stage: Stage, model: ModelSize, args: Args, load: TrainingLoad) -> Estimate:
    c = load.compute_bytes
    own = states(stage, args, compute_bytes=c, num_ranks=load.num_ranks)
    critic: dict[str, int] = {}
    if load.num_critic_ranks:
        critic = states(stage, args, compute_bytes=c, num_ranks=load.num_critic_ranks)
    parts = own | {"critic": sum(critic.values()), "activations": activations(model, stage, args, load)}
    asleep = own["weights"] + own["optimizer"] + critic.get("weights", 0) + critic.get("optimizer", 0)
    moments = on_host(stage, args, num_ranks=load.num_ranks)
    if load.num_critic_ranks:
        moments += on_host(stage, args, num_ranks=load.num_critic_ranks)
    return Estimate(parts, asleep, load.num_frozen * own["weights"], moments)
