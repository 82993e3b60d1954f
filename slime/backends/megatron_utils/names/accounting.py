"""Each tensor of an HF checkpoint accounted for: mapped, passed through by name, or an error that names it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from slime.backends.megatron_utils.names.hf_directory import HFDirectory
from slime.backends.megatron_utils.names.mapping import all_parameters
from slime.backends.megatron_utils.names.model_shape import ModelShape, NameMapError
from slime.backends.megatron_utils.names.shape import family_of

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
    patterns = [pattern.replace("{num_layers}", str(shape.num_layers)) for pattern in family_of(shape).passed_through]
    patterns += [_BUFFERS, *([r"lm_head\.weight"] if shape.tied else [])]
    matches = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return sorted(name for name in names if matches.fullmatch(name))


def passed_through_tensors(shape: ModelShape, original: HFDirectory) -> Iterator[tuple[str, Tensor]]:
    """Tensors to add to what Megatron's parameters make up, so that an HF directory is as complete as the original one.

    Those of tied weights are not among them: they would be old.
    """
    for name in passed_through(shape, original.shapes):
        if name != "lm_head.weight":
            yield name, original.tensor(name)
