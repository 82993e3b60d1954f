"""Under which key, and where in it, a parameter lies in a `torch_dist` checkpoint.

Megatron-core stacks layers that are all alike (`decoder.layers.mlp.linear_fc2.weight` [layers, hidden, ffn]) and names
them one by one otherwise (`decoder.layers.3.mlp...`); experts are stacked in either case. Norms are called after the
linear layer that Transformer Engine fuses them into, or by their own names: this depends on the spec that asks, so they
are written under both where specs differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from slime.backends.megatron_utils.names import Mapped, ModelShape

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}


class Slot(NamedTuple):
    """A place in a stacked tensor: the position on, and the length of, each axis in front of the parameter's own."""

    key: str
    position: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()


def slots(shape: ModelShape, parameter: Mapped, *, stacked: bool) -> list[Slot]:
    """Every place where specs of Megatron-core look for a parameter. A copy of tied weights has none."""
    if parameter.is_copy:
        return []
    match = _LAYER.fullmatch(parameter.name)
    if match is None:
        return [Slot(parameter.name)]
    layer, rest = int(match[1]), match[2]
    slot = Slot("decoder.layers.", (layer,), (shape.num_layers,)) if stacked else Slot(f"decoder.layers.{layer}.")
    if expert := _EXPERT.fullmatch(rest):
        experts = (shape.size("experts"),)
        key = f"{slot.key}mlp.experts.experts.{expert[2]}"
        return [Slot(key, (*slot.position, int(expert[1])), slot.lengths + experts)]
    return [slot._replace(key=slot.key + name) for name in _spec_names(shape, rest, layer)]


def extra_states(shape: ModelShape, parameters: Iterable[Mapped], *, stacked: bool) -> list[str]:
    """Keys of the `_extra_state` objects (of FP8 training; empty otherwise) that modules insist on when they load."""
    keys: dict[str, None] = {}
    for parameter in parameters:
        for slot in slots(shape, parameter, stacked=stacked):
            module, _, last = slot.key.rpartition(".")
            shard = f"{'.'.join(map(str, slot.position or (0,)))}_{'.'.join(map(str, slot.lengths or (1,)))}"
            if last == "weight":
                keys[f"{module}._extra_state/shard_{shard}"] = None
            if module.endswith("self_attention.linear_proj"):
                keys[f"{module.removesuffix('linear_proj')}core_attention._extra_state/shard_{shard}"] = None
    return list(keys)


def _spec_names(shape: ModelShape, name: str, layer: int) -> Iterator[str]:
    fused = _FUSED.get(name)
    if fused is None:
        yield name
    elif shape.mla is not None:  # the local spec of latent attention has no fused names
        yield name
        if name != "input_layernorm.weight" and not (name == "pre_mlp_layernorm.weight" and shape.has_experts(layer)):
            yield fused
    elif name in ("self_attention.q_layernorm.weight", "self_attention.kv_layernorm.weight"):
        yield name
    else:
        yield fused
        if name == "pre_mlp_layernorm.weight" and shape.has_experts(layer):
            yield name
