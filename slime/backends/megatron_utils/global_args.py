"""What `megatron.training.get_args()` returns in trainers, for users' functions that are written for Megatron-LM."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from slime.backends.megatron_utils import transformer
from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.megatron_utils.effects import RENAMED
from slime.backends.megatron_utils.flags import megatron_parser
from slime.backends.megatron_utils.model_arguments import SWITCH, facts
from slime.backends.megatron_utils.names import ModelShape, read_shape
from slime.backends.shared.precision import compute_dtype
from slime.config.model import context_length, read_model_config
from slime.config.run import RunConfig

logger = logging.getLogger(__name__)


class Made(NamedTuple):
    """What a rank's model is made from. fields: of Megatron's configurations. options: GPTModel's other arguments."""

    fields: dict[str, Any]
    options: dict[str, Any]


def set_global_args(
    run: RunConfig, cfg: MegatronConfig, device: torch.device, *, transformer_engine: bool, is_critic: bool
) -> None:
    """Let `get_args()` return `namespace_of` this rank; nothing else of Megatron-LM is started.

    Where `megatron.training` cannot be imported it says so: nobody can call its `get_args` then.
    """
    try:
        parser = megatron_parser()
    except ImportError as error:
        logger.warning("megatron.training cannot be imported, and has no get_args() for plug-ins: %s", error)
        return
    from megatron.training.global_vars import set_args

    made = made_of(run, cfg, device, transformer_engine=transformer_engine, is_critic=is_critic)
    set_args(namespace_of(parser, run, cfg, made))


def made_of(
    run: RunConfig, cfg: MegatronConfig, device: torch.device, *, transformer_engine: bool, is_critic: bool
) -> Made:
    """What the settings of a rank come to."""
    shape, dtype = read_shape(run.hf_checkpoint), compute_dtype(run, device)
    config = transformer.transformer_config(
        shape,
        cfg,
        context_size=run.context_parallel_size,
        dtype=dtype,
        device=device,
        transformer_engine=transformer_engine,
    )
    config.transformer_impl = "transformer_engine" if transformer_engine else "local"
    parts = (transformer.ddp_config(cfg), transformer.optimizer_config(run, cfg, dtype=dtype), config)
    fields = {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}
    return Made(fields, transformer.model_options(shape, cfg, is_critic=is_critic))


def namespace_of(
    parser: argparse.ArgumentParser, run: RunConfig, cfg: MegatronConfig, made: Made
) -> argparse.Namespace:
    """A copy of all settings, under Megatron's names as well, with the values that this rank uses.

    Later ones go over earlier ones: defaults of `parser`, the user's own flags, what Megatron's configurations are made
    with, what config.json says, slime's settings, what Megatron-LM derives from these. Needs torch.distributed.
    """
    values = vars(parser.parse_args([]))
    kinds = ((run, type(run)), (cfg, MegatronConfig))  # one object may be both
    settings = {field.name: getattr(part, field.name) for part, kind in kinds for field in dataclasses.fields(kind)}
    values |= run.plugin_settings | cfg.megatron_args | _as_parsed(made.fields, values)
    values |= _described(read_shape(run.hf_checkpoint), parser)
    values |= {name: value for name, value in settings.items() if value is not None or name not in made.fields}
    values |= {name: made.fields[name] for name in ("bf16", "fp16", "transformer_impl")}
    values |= _derived(run, cfg) | {
        "padded_vocab_size": made.options["vocab_size"],
        "position_embedding_type": made.options["position_embedding_type"],
        "untie_embeddings_and_output_weights": not made.options["share_embeddings_and_output_weights"],
    }
    return argparse.Namespace(**copy.deepcopy(values))


def _as_parsed(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Fields of configurations, under the names of Megatron's parser too."""
    named = {name: fields[field] for name, field in RENAMED.items() if field in fields}
    named["no_persist_layer_norm"] = not fields["persist_layer_norm"]
    if not isinstance(fields["cp_comm_type"], list):  # one for each layer, or the same for all
        named["cp_comm_type"] = [fields["cp_comm_type"]] if fields["cp_comm_type"] else defaults.get("cp_comm_type")
    return fields | named


def _described(shape: ModelShape, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What config.json says, by the names of this parser."""
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    known = [(actions[fact.flag], fact.value) for fact in facts(shape) if fact.flag in actions]
    return {action.dest: action.const if value is SWITCH else value for action, value in known}


def _derived(run: RunConfig, cfg: MegatronConfig) -> dict[str, Any]:
    """Sizes that come from others. A length is as given, else what the model was made for."""
    longest = context_length(read_model_config(run.hf_checkpoint)) or transformer.LONGEST
    length = run.plugin_settings.get("seq_length", run.rollout_max_context_len or longest)
    return {
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "distributed_backend": dist.get_backend(),
        "data_parallel_size": dist.get_world_size() // (cfg.model_parallel_size * run.context_parallel_size),
        "transformer_pipeline_model_parallel_size": cfg.pipeline_model_parallel_size,
        "seq_length": length,
        "encoder_seq_length": length,
        "max_position_embeddings": run.plugin_settings.get("max_position_embeddings", longest),
        "make_vocab_size_divisible_by": 1,
    }
