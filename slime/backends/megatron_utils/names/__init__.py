"""Hugging Face tensors <-> Megatron-core parameters: one table of names and layouts per family, pure functions on top.

    shape = read_shape(hf_directory)                       # ModelShape, from config.json
    checkpoint = HFDirectory(hf_directory)                 # opens files lazily, reads slices
    check_checkpoint(shape, checkpoint.shapes)             # each tensor accounted for, or an error that names it
    place = ParallelPlace(layers=range(18, 36), tp_rank=1, tp_size=2, padded_vocab_size=151936)

    for name, parameter in model.state_dict().items():     # load: only what this rank holds is read
        if not name.endswith("_extra_state"):
            mapped = map_parameter(shape, place, name)
            fill_local(mapped, checkpoint.read, parameter)

    mapped = map_parameter(shape, place, name)             # weight sync and save: the way back
    hf_tensors(mapped, shards)                             # [(hf name, full tensor)]; shards: mapped.num_shards many,
                                                           # those of all tp ranks in order (experts: of the etp ranks)

`place.layers` are the global numbers (from 0) of the decoder layers of one model chunk, in order; the backend names a
layer by its global number, in a place of all layers. Names may be those of the local spec (`input_layernorm.weight`)
or of Transformer Engine's (`self_attention.linear_qkv.layer_norm_weight`), experts sequential
(`local_experts.3.linear_fc1.weight`) or grouped (`experts.linear_fc1.weight3`), with or without `module.` in front.
Use `state_dict()`, not `named_parameters()`: the
router's `expert_bias` is a buffer. A second copy of tied weights (`output_layer.weight` of the last stage) is loaded
from the embedding, and `hf_tensors` returns [] for it. Of a parameter that is not sharded `hf_tensors` returns the
tensor itself, not a copy.
"""

from slime.backends.megatron_utils.names.accounting import check_checkpoint, passed_through
from slime.backends.megatron_utils.names.families import FAMILIES, Family
from slime.backends.megatron_utils.names.hf_directory import HFDirectory
from slime.backends.megatron_utils.names.mapping import (
    Mapped,
    ParallelPlace,
    all_parameters,
    canonical_name,
    fill_local,
    hf_tensors,
    local_tensor,
    map_parameter,
)
from slime.backends.megatron_utils.names.model_shape import ModelShape, NameMapError
from slime.backends.megatron_utils.names.shape import read_shape, shape_of

__all__ = [
    "FAMILIES",
    "Family",
    "HFDirectory",
    "Mapped",
    "ModelShape",
    "NameMapError",
    "ParallelPlace",
    "all_parameters",
    "canonical_name",
    "check_checkpoint",
    "fill_local",
    "hf_tensors",
    "local_tensor",
    "map_parameter",
    "passed_through",
    "read_shape",
    "shape_of",
]
