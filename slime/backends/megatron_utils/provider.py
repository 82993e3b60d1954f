"""The model of --custom-model-provider-path: built by the user, checked here, as names, files and engines go by it."""

from __future__ import annotations

import inspect
import re
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from slime.backends.megatron_utils.names import ModelShape, NameMapError, ParallelPlace, all_parameters, map_parameter
from slime.utils.misc import load_function

FLAG = "--custom-model-provider-path"


def provided_model(path: str, *, pre_process: bool, post_process: bool, **further: Any) -> GPTModel:
    """What the function at `path` returns for `(pre_process, post_process)` and those of `further` that it names.

    further: vp_stage, config, transformer_layer_spec and the other arguments with which slime would make a GPTModel.
    Raises ValueError where that is no such stage of a GPTModel.
    """
    function = load_function(path)
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = {name: value for name, value in further.items() if takes_all or name in parameters}
    lm = function(pre_process=pre_process, post_process=post_process, **known)
    if not isinstance(lm, GPTModel):
        raise ValueError(f"{FLAG} {path} must return a GPTModel of Megatron-core, got {type(lm).__name__}")
    if (lm.pre_process, lm.post_process) != (pre_process, post_process):
        raise ValueError(
            f"{FLAG} {path}: of a stage with pre_process {pre_process}, post_process {post_process} it made one with "
            f"{lm.pre_process}, {lm.post_process}"
        )
    expected = len(further["transformer_layer_spec"].layer_specs)
    if len(lm.decoder.layers) != expected:
        raise ValueError(f"{FLAG} {path}: its stage has {len(lm.decoder.layers)} layers, {expected} are this rank's")
    return lm


def check_provided(path: str, weights: dict[str, Tensor], shape: ModelShape, place: ParallelPlace) -> None:
    """Raise ValueError unless `weights`, a stage's by name, are those of the tables: as many, and of their shapes."""
    found = set()
    for name, tensor in weights.items():
        try:
            mapped = map_parameter(shape, place, name)
        except NameMapError as error:
            raise ValueError(f"{FLAG} {path}: {error}, so that engines would not get it") from error
        expected = mapped.local_shape(mapped.rank)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{FLAG} {path}: {name} has shape {tuple(tensor.shape)}, config.json asks for {expected}")
        found.add(mapped.name)
    num_experts = 0 if shape.moe is None else shape.moe.num_experts // place.ep_size
    experts = (None, *range(place.ep_rank * num_experts, (place.ep_rank + 1) * num_experts))
    layers = {layer for layer, _ in map(_numbers, found)}
    for mapped in all_parameters(shape):
        layer, expert = _numbers(mapped.name)
        if layer is not None and layer in layers and expert in experts and mapped.name not in found:
            raise ValueError(f"{FLAG} {path}: its model has no {mapped.name}, which config.json asks for")


def _numbers(name: str) -> tuple[int | None, int | None]:
    """Those of the layer and of the expert, if it is of one."""
    layer, expert = (re.search(pattern, name) for pattern in (r"layers\.(\d+)\.", r"local_experts\.(\d+)\."))
    return int(layer[1]) if layer else None, int(expert[1]) if expert else None
