"""How the layers of a model are shared among the ranks of a pipeline, and among the virtual stages of a rank.

With 8 layers, 2 ranks and 2 virtual stages rank 0 holds layers [0, 1] and [4, 5], rank 1 holds [2, 3] and [6, 7]: what
rank 0 has begun comes back to it after 2 layers of rank 1 and not after 4, so that ranks wait less for each other.
"""

from __future__ import annotations

from typing import Any

from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.config.base import ConfigError

_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_VIRTUAL, _VIRTUAL_LAYERS = "--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage"
_LAYOUT = "pipeline_model_parallel_layout"
_COUNTED_AS_LAYERS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
# Neighbours that send both ways at once would take activations for gradients where they are two: slime sets these.
_COMMUNICATION = ("overlap_p2p_comm", "batch_p2p_comm", "overlap_p2p_comm_warmup_flush")


def num_virtual_stages(cfg: MegatronConfig, num_layers: int) -> int:
    """Stages of each pipeline rank, 1 without virtual ones.

    num_layers: of the whole model. Raises ConfigError where they cannot be shared as the settings say.
    """
    if "virtual_pipeline_model_parallel_size" in cfg.megatron_args:
        raise ConfigError(f"virtual_pipeline_model_parallel_size is no setting of its own: give {_VIRTUAL}.")
    count = _of_layout(cfg) if _LAYOUT in cfg.megatron_args else _of_layers(cfg, layers_of_ranks(cfg, num_layers))
    if count > 1 and cfg.pipeline_model_parallel_size == 1:
        raise ConfigError("Virtual pipeline stages need --pipeline-model-parallel-size above 1.")
    for name in _COMMUNICATION:
        if count > 1 and name in cfg.megatron_args:
            raise ConfigError(f"{name} cannot be set with virtual pipeline stages: leave it out.")
    return count


def micro_batch_group(cfg: MegatronConfig, num_virtual: int) -> int:
    """What the number of micro-batches of a step must be a multiple of: virtual stages take turns by that many."""
    given: int | None = cfg.megatron_args.get("microbatch_group_size_per_vp_stage")
    return 1 if num_virtual == 1 else given or cfg.pipeline_model_parallel_size


def _of_layout(cfg: MegatronConfig) -> int:
    return int(_layout(cfg).virtual_pipeline_model_parallel_size)


def _layout(cfg: MegatronConfig) -> Any:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        return PipelineParallelLayerLayout(cfg.megatron_args[_LAYOUT], cfg.pipeline_model_parallel_size)
    except AssertionError as error:
        raise ConfigError(f"--pipeline-model-parallel-layout: {error}.") from error


def _of_layers(cfg: MegatronConfig, layers: list[int]) -> int:
    count, per_stage = cfg.num_virtual_stages_per_pipeline_rank, cfg.num_layers_per_virtual_pipeline_stage
    if per_stage is not None:
        if count is not None or cfg.decoder_first_pipeline_num_layers or cfg.decoder_last_pipeline_num_layers:
            raise ConfigError(f"{_VIRTUAL_LAYERS} goes with no other flag that shares layers: give {_VIRTUAL}.")
        if layers[0] % per_stage:
            raise ConfigError(f"{_VIRTUAL_LAYERS} {per_stage} must divide the {layers[0]} layers of a pipeline rank.")
        return layers[0] // per_stage
    count = count or 1
    if any(number % count for number in layers):
        raise ConfigError(f"{_VIRTUAL} {count} must divide the layers of each pipeline rank: they have {layers}.")
    return count


def layers_of_ranks(cfg: MegatronConfig, num_layers: int) -> list[int]:
    """The number of layers of each pipeline rank. Raises ConfigError where they cannot be shared so."""
    if _LAYOUT in cfg.megatron_args:
        ranks = _layout(cfg).layout
        return [sum(part.name == "decoder" for stage in rank for part in stage) for rank in ranks]
    first, last = cfg.decoder_first_pipeline_num_layers, cfg.decoder_last_pipeline_num_layers
    size = cfg.pipeline_model_parallel_size
    num_middle = size - (first is not None) - (last is not None)
    middle = num_layers - (first or 0) - (last or 0)
    middle += sum(bool(cfg.megatron_args.get(name)) for name in _COUNTED_AS_LAYERS)
    each, rest = divmod(middle, num_middle) if num_middle > 0 else (0, middle)
    if rest or num_middle < 0 or (num_middle > 0 and each < 1):
        ends = "".join(f", {flag} {number}" for flag, number in ((_FIRST, first), (_LAST, last)) if number)
        raise ConfigError(
            f"{num_layers} layers cannot be shared among --pipeline-model-parallel-size {size}{ends}: {middle} are "
            f"left for {num_middle} ranks with as many each. Set {_FIRST} or {_LAST} so that they are."
        )
    return [number for number in (first, *[each] * num_middle, last) if number is not None]
