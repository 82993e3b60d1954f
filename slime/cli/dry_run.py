"""`slime train --dry-run`: the plan of a run that passed every check, printed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slime.arguments import Args
from slime.backends.megatron_utils.find import find_megatron
from slime.backends.megatron_utils.names import read_shape
from slime.backends.megatron_utils.stages import layers_of_ranks as num_layers_of_ranks
from slime.cli.megatron_memory import Estimate
from slime.cli.megatron_memory import estimate as megatron_estimate
from slime.cli.memory_estimate import (
    Counts,
    ModelSize,
    TrainingLoad,
    asleep_bytes,
    kv_bytes_per_token,
    training_peak,
)
from slime.cli.preflight import Findings
from slime.config import ConfigError
from slime.config.model import read_model_config
from slime.ray.engine_command import resolve_engine, transport_kind
from slime.rollout.eval_data import samples_per_prompt
from slime.weight_sync.folder import checkpoint_bytes

_TYPICAL_PROMPT = 512  # tokens assumed of a prompt where nothing bounds it


class Section(NamedTuple):
    """A title and its lines."""

    title: str
    rows: list[tuple[str, str]]


class MetaModel(NamedTuple):
    """The model that config.json describes, without its data."""

    counts: Counts
    weight_bytes: int  # of one parameter in the checkpoint's dtype


def print_plan(args: Args, findings: Findings) -> None:
    """Print slots, batches, data, model, memory, folders. Raises ConfigError where weights do not fit config.json."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="dry run: nothing was started", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for section in plan(args, findings):
        table.add_row(f"[bold]{section.title}[/bold]", "")
        for name, value in section.rows:
            table.add_row(f"  {name}", value)
    Console(soft_wrap=True).print(table)


def plan(args: Args, findings: Findings) -> Iterator[Section]:
    """The sections of the plan, in order."""
    model = _meta_model(args.hf_checkpoint, findings, trust_remote_code=args.trust_remote_code)
    yield Section("slots", list(_slots(args)))
    yield Section("data", list(_data(args, findings)))
    yield Section("batches", list(_batches(args, findings)))
    yield Section("model", list(_model(args, findings, model)))
    yield Section("memory, estimated", list(_memory(args, findings, model)))
    yield Section("folders", list(_folders(args)))


def _slots(args: Args) -> Iterator[tuple[str, str]]:
    trainers = f"{args.num_trainers} ({args.actor_num_nodes} x {args.actor_num_gpus_per_node}), {args.train_backend}"
    if args.context_parallel_size > 1:
        trainers += f", {args.context_parallel_size} share the tokens of a sample"
    yield "trainers", "none (--debug-rollout-only)" if args.debug_rollout_only else trainers
    if args.train_backend == "megatron" and not args.debug_rollout_only:
        yield "megatron", str(find_megatron())
        yield "parallel", _parallel_layout(args)
    if args.needs_critic:
        yield (
            "critic",
            f"{args.num_critics}, in " + ("slots of its own" if args.has_critic_slots else "the trainers' slots"),
        )
    if args.debug_train_only:
        yield "engines", "none (--debug-train-only)"
        return
    if args.rollout_external_engine_addrs is not None:
        yield "engines", f"{args.num_engines}, external"
    else:
        yield from _engines(args)
    own = "sglang-router, on a free port" + (", for each model" if args.file_models else "")
    external = f"external, {args.sglang_router_ip}:{args.sglang_router_port}"
    yield "router", external if args.sglang_router_ip is not None else own
    yield "weights travel by", _transport(args)


def _parallel_layout(args: Args) -> str:
    """Who shares what, for Megatron."""
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    layers = num_layers_of_ranks(args, read_model_config(args.hf_checkpoint)["num_hidden_layers"])
    parts = [
        f"tensor {tensor}" + (", sequence too" if args.sequence_parallel else ""),
        f"pipeline {args.pipeline_model_parallel_size} ({' + '.join(map(str, layers))} layers)",
        f"context {context}",
        f"data {args.num_trainers // (args.model_parallel_size * context)}"
        + (" (and the optimizer's state)" if args.use_distributed_optimizer else ""),
    ]
    if args.expert_model_parallel_size > 1:
        parts.append(f"experts {args.expert_model_parallel_size} x {args.expert_tensor_parallel_size or tensor}")
    return "; ".join(parts)


def _transport(args: Args) -> str:
    """The transport of weights on the devices that the run is for."""
    return transport_kind(_with_engine(args), _device_of(args))


def _with_engine(args: Args) -> Args:
    return resolve_engine(args, _device_of(args))


def _device_of(args: Args) -> str:
    return "cuda" if _has_gpus(args) else "cpu"


def _engines(args: Args) -> Iterator[tuple[str, str]]:
    where = "in the trainers' slots, in turns" if args.colocate else "in slots of their own"
    for model in args.served_models:
        groups = [group for group in model.groups if group.num_engines]
        sizes = [(f"{group.num_engines} x {group.num_gpus_per_engine}", group.worker_type) for group in groups]
        kinds = ", ".join(size if kind == "regular" else f"{size} ({kind})" for size, kind in sizes)
        weights = "" if model.update_weights else f", weights of {model.model_path}"
        name = f"engines of {model.name}" if args.file_models else "engines"
        yield name, f"{kinds}, {args.rollout_engine}, {where}{weights}"


def _data(args: Args, findings: Findings) -> Iterator[tuple[str, str]]:
    if findings.num_prompts is not None:
        yield "prompts", f"{findings.num_prompts:,} in {args.prompt_data}"
    else:
        yield "prompts", "unknown (the run itself finds them)"
    for name, num_samples in samples_per_prompt(args, findings.eval_sizes).items():
        yield f"evaluation {name}", f"{findings.eval_sizes[name]:,} prompts, {num_samples} samples each"


def _batches(args: Args, findings: Findings) -> Iterator[tuple[str, str]]:
    assert args.rollout_batch_size is not None
    assert args.global_batch_size is not None
    num_samples = args.rollout_batch_size * args.n_samples_per_prompt
    yield "rollout", f"{args.rollout_batch_size} prompts x {args.n_samples_per_prompt} samples = {num_samples} samples"
    yield "optimizer steps", f"{args.num_steps_per_rollout} a rollout, {args.global_batch_size} samples each"
    num_rollout = args.num_rollout
    if num_rollout is None and findings.num_prompts:
        num_rollout = max(1, (args.num_epoch or 1) * findings.num_prompts // args.rollout_batch_size)
    if num_rollout is not None:
        epochs = num_rollout * args.rollout_batch_size / findings.num_prompts if findings.num_prompts else math.nan
        passes = "" if math.isnan(epochs) else f", {epochs:.2f} passes over the prompts"
        yield "rollouts", f"{num_rollout}{passes}, {num_rollout * (args.num_steps_per_rollout or 1)} optimizer steps"
    if args.use_dynamic_batch_size:
        yield "micro-batches", f"at most {(args.max_tokens_per_gpu or 0) * args.context_parallel_size} tokens each"
    else:
        yield "micro-batches", f"{args.micro_batch_size} samples each"


def _model(args: Args, findings: Findings, model: MetaModel) -> Iterator[tuple[str, str]]:
    config = findings.model.config
    yield "weights", args.hf_checkpoint
    parts = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    shape = ", ".join(f"{name} {config[name]}" for name in parts if name in config)
    yield "shape", f"{config.get('model_type', 'unknown')}: {shape}"
    yield "parameters", f"{model.counts.num_parameters:,}"


def _memory(args: Args, findings: Findings, model: MetaModel) -> Iterator[tuple[str, str]]:
    try:
        size = ModelSize.from_config(findings.model.config, model.counts)
    except KeyError as error:
        yield "unknown", f"config.json has no {error}"
        return
    trainer = _trainer_estimate(args, size)
    if not args.debug_rollout_only:
        yield from _trainer_memory(args, trainer)
    if not args.debug_train_only:
        yield from _engine_memory(args, size, model, trainer)


def _trainer_estimate(args: Args, size: ModelSize) -> Estimate:
    load = training_load(args)
    if args.train_backend == "megatron":
        return megatron_estimate(read_shape(args.hf_checkpoint), size, args, load)
    return Estimate(training_peak(size, load), asleep_bytes(size, load), 0)


def _trainer_memory(args: Args, trainer: Estimate) -> Iterator[tuple[str, str]]:
    parts = {name: value for name, value in trainer.parts.items() if value}
    details = ", ".join(f"{name} {gib(value)}" for name, value in parts.items())
    peak, total = sum(parts.values()), gpu_bytes()
    yield "each trainer", f"{gib(peak)} at its peak: {details}"
    if total is not None:
        yield "a GPU of this machine", f"{gib(total)}, {peak / total:.0%} of it at a trainer's peak"
    if trainer.frozen:
        yield "frozen models", f"{gib(trainer.frozen)} a trainer, page-locked, on the host"
    if trainer.moments:
        yield "moments of Adam", f"{gib(trainer.moments)} a trainer, page-locked, on the host"
    if args.offload_train:
        yield "each trainer asleep", f"{gib(trainer.asleep)}, page-locked, on the host"


def _engine_memory(args: Args, size: ModelSize, model: MetaModel, trainer: Estimate) -> Iterator[tuple[str, str]]:
    smallest = min((group.num_gpus_per_engine for group in args.policy.groups if group.num_engines), default=1)
    weights = model.counts.num_parameters * model.weight_bytes // smallest
    of_latents = size.latent is not None and _with_engine(args).rollout_engine == "sglang"
    cache = kv_bytes_per_token(size, model.weight_bytes, of_latents=of_latents)
    yield (
        "each engine slot",
        f"weights {gib(weights)}, cache {cache / 1024:,.1f} KiB a token; "
        "SGLang takes --sglang-mem-fraction-static of its GPU",
    )
    for other in (other for other in args.file_models if not other.update_weights):
        smallest = min(group.num_gpus_per_engine for group in other.groups if group.num_engines)
        yield f"each engine slot of {other.name}", f"weights {gib(checkpoint_bytes(other.model_path) // smallest)}"
    if args.colocate and not args.debug_rollout_only:
        both = trainer.asleep + weights + 2 * args.update_weight_buffer_size
        yield "while weights are sent", f"{gib(both)}: a trainer's, an engine's weights, two buckets"


def training_load(args: Args) -> TrainingLoad:
    """What a rank of the actor holds at a time: packs and samples of the largest sizes that the settings allow."""
    is_gpu = _has_gpus(args)
    sample_tokens = (args.rollout_max_prompt_len or _TYPICAL_PROMPT) + args.rollout_max_response_len
    if args.rollout_max_context_len is not None:
        sample_tokens = min(sample_tokens, args.rollout_max_context_len)
    pack_tokens = args.max_tokens_per_gpu if args.use_dynamic_batch_size else None
    tokens = pack_tokens or args.micro_batch_size * sample_tokens // args.context_parallel_size
    return TrainingLoad(
        num_ranks=args.num_trainers,
        micro_batch_tokens=tokens,
        logit_chunk_tokens=args.log_probs_chunk_size,
        compute_bytes=2 if args.fp16 or (is_gpu if args.bf16 is None else args.bf16) else 4,
        num_frozen=sum((args.needs_reference, args.keep_old_actor, args.opd_teacher_load is not None)),
        num_critic_ranks=args.num_critics if args.needs_critic and not args.has_critic_slots else 0,
        recomputes=args.gradient_checkpointing,
        is_compiled=is_gpu if args.torch_compile is None else args.torch_compile,
        keeps_layers=not args.fsdp_reshard_after_forward,
        offloads_states=args.fsdp_cpu_offload,
        parks_frozen=args.offload_ref,
        accumulates=(args.global_batch_size or 1) * sample_tokens > tokens * args.num_trainers,
    )


def gpu_bytes() -> int | None:
    """The memory of this machine's first GPU; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _has_gpus(args: Args) -> bool:
    """Whether the run is for GPUs: as --device says, else those of this machine; a cluster that is joined has some."""
    import torch

    is_somewhere = torch.cuda.is_available() or "RAY_ADDRESS" in os.environ
    return args.device == "cuda" or (args.device == "auto" and is_somewhere)


def _folders(args: Args) -> Iterator[tuple[str, str]]:
    from slime.ray.job import run_directory

    yield "run directory", str(run_directory(args))
    if args.load is not None:
        exists = (Path(args.load) / "latest_checkpointed_iteration.txt").is_file()
        yield "continues from", f"{args.load}{'' if exists else ' (no checkpoint there yet: starts anew)'}"
    if args.save is not None:
        interval = f"every {args.save_interval} rollouts and " if args.save_interval else ""
        yield "checkpoints", f"{interval}at the end, in {args.save}"


def _meta_model(directory: str, findings: Findings, *, trust_remote_code: bool) -> MetaModel:
    """The model of config.json on the meta device, its shapes compared with those of the weights on disk."""
    import torch

    model = empty_model(directory, trust_remote_code=trust_remote_code)
    for name, tensor in model.state_dict().items():
        found = findings.model.shapes.get(name, tuple(tensor.shape))
        if found != tuple(tensor.shape):
            raise ConfigError(
                f"--hf-checkpoint: {directory}: tensor {name} has shape {found}, its config.json asks for "
                f"{tuple(tensor.shape)}."
            )
    dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.float32
    return MetaModel(count(model), dtype.itemsize)


def empty_model(directory: str, *, trust_remote_code: bool = False) -> Any:
    """The causal LM that config.json describes, on the meta device."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return factory.from_config(config, trust_remote_code=trust_remote_code)


def count(lm: Any) -> Counts:
    """What memory depends on and config.json does not say. lm: a causal LM of transformers, not sharded."""
    from slime.backends.fsdp_utils.model import decoder_layers

    layers = decoder_layers(lm)
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    names = dict(layers[0].named_modules())
    width = lm.config.get_text_config().hidden_size
    norms = [name for name, module in names.items() if _is_norm(module, width)]
    return Counts(
        num_parameters=sum(parameter.numel() for parameter in lm.parameters()),
        num_root=sum(parameter.numel() for parameter in lm.parameters() if id(parameter) not in in_layers),
        num_norms=sum(not name.endswith(("q_norm", "k_norm")) for name in norms),
        has_query_norms=any(name.endswith("q_norm") for name in names),
    )


def _is_norm(module: Any, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and tuple(weight.shape) == (width,)


def gib(num_bytes: int) -> str:
    """As GiB, or MiB where it is little."""
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 // 100 else f"{num_bytes / 2**20:,.2f} MiB"
