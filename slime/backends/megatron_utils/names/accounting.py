"""Each tensor of an HF checkpoint accounted for: mapped, passed through by name, or an error that names it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from slime.backends.megatron_utils.names.mapping import all_parameters
from slime.backends.megatron_utils.names.model_shape import ModelShape, NameMapError
from slime.utils.mtp import mtp_names

_BUFFERS = r".*\.rotary_emb\.inv_freq"  # some old checkpoints hold what the model computes


def check_checkpoint(shape: ModelShape, found: Mapping[str, Sequence[int]]) -> None:
    """Raise NameMapError, naming the first tensor that is missing, of another shape, or in no table.

    found: the shape of each tensor of the checkpoint, by name.
    """
    expected = {name: size for parameter in all_parameters(shape) for name, size in parameter.hf}
    for name, size in expected.items():
        if name not in found:
            raise NameMapError(f"tensor {name} is missing in the checkpoint")
        if tuple(found[name]) != size:
            raise NameMapError(f"tensor {name} has shape {tuple(found[name])}, config.json asks for {size}")
    left_over = found.keys() - expected.keys() - set(passed_through(shape, found))
    if left_over:
        raise NameMapError(f"tensor {min(left_over)} of the checkpoint is in no table of {shape.family}")


def passed_through(shape: ModelShape, names: Iterable[str]) -> list[str]:
    """Those of an HF checkpoint's tensors that no Megatron parameter is made of: MTP layers, a tied output's copy."""
    layers = {"num_hidden_layers": shape.num_layers, "num_nextn_predict_layers": shape.num_mtp_layers}
    patterns = [_BUFFERS, mtp_names(layers).pattern, *([r"lm_head\.weight"] if shape.tied else [])]
    matches = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return sorted(name for name in names if matches.fullmatch(name))
