"""Checkpoints of Megatron's older format: `mp_rank_TT[_PPP]/model_optim_rng.pt`, one file a rank.

Files are mapped into memory. Of what they pickle, tensors and containers are built; everything else (arguments, random
states, classes of a Megatron that need not be here) becomes an inert stand-in, so that no code of the file runs.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slime.backends.megatron_utils.names import Mapped, ModelShape, NameMapError, ParallelPlace, map_parameter

_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(_\d+)?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_SAFE = re.compile(
    r"collections OrderedDict|torch (Size|\w*Storage|device|bfloat16|float\w+)|torch\._utils _rebuild_\w+"
)


class Sharded(NamedTuple):
    """A parameter of the whole model, and the shards of its tensor-parallel ranks."""

    parameter: Mapped
    shards: list[Tensor]


def read_torch_format(folder: Path, shape: ModelShape) -> Iterator[Sharded]:
    """Every parameter in the files of a checkpoint. Raises NameMapError where ranks are missing or experts split."""
    stages = _stages(folder)
    first = 0
    for stage in stages:
        states = [_model_state(path) for path in stage]
        numbers = {int(match[1]) for name in states[0] if (match := _LAYER.match(name))}
        layers = range(first, first + len(numbers))
        first += len(layers)
        for name in states[0]:
            if not name.endswith("_extra_state"):
                yield _joined(shape, layers, name, [state[name] for state in states])
    if first != shape.num_layers:
        raise NameMapError(
            f"{folder} holds {first} layers, config.json says {shape.num_layers}. "
            "Where experts are split among ranks, save in the torch_dist format."
        )


def _stages(folder: Path) -> list[list[Path]]:
    """Files by pipeline stage, then by tensor-parallel rank."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _FOLDER.fullmatch(path.name)
        if match is None or match[3]:
            raise NameMapError(f"{path}: experts split among ranks are read from the torch_dist format only")
        found.setdefault(int(match[2] or 0), {})[int(match[1])] = path / "model_optim_rng.pt"
    sizes = Counter(len(ranks) for ranks in found.values())
    complete = all(set(ranks) == set(range(len(ranks))) for ranks in found.values())
    if len(sizes) != 1 or not complete or set(found) != set(range(len(found))):
        raise NameMapError(
            f"{folder} lacks folders of ranks; present: {sorted(p.name for p in folder.glob('mp_rank_*'))}"
        )
    return [[found[stage][rank] for rank in sorted(found[stage])] for stage in sorted(found)]


def _model_state(path: Path) -> Mapping[str, Tensor]:
    state = read_tensors(path)
    if "model" not in state:
        raise NameMapError(f"{path} has no 'model'; virtual pipeline stages are read from the torch_dist format only")
    model: Mapping[str, Tensor] = state["model"]
    return model


def read_tensors(path: Path) -> dict[str, Any]:
    """All of a file, mapped into memory; what is neither tensor nor container is inert. Raises NameMapError."""
    module = SimpleNamespace(__name__="pickle", Unpickler=_TensorsOnly, load=pickle.load)
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=module)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise NameMapError(f"{path} cannot be read: {error}") from error
    state: dict[str, Any] = loaded
    return state


def _joined(shape: ModelShape, layers: range, name: str, tensors: list[Tensor]) -> Sharded:
    size = len(tensors)
    place = ParallelPlace(layers=layers, tp_size=size, etp_size=size)
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        place = ParallelPlace(layers=layers, tp_size=size, padded_vocab_size=size * len(tensors[0]))
    mapped = map_parameter(shape, place, name)
    if not mapped.layout.is_sharded and tuple(tensors[0].shape) != mapped.local_shape(0):
        split = ParallelPlace(layers=layers, tp_size=size, shards_down_projections=True)
        mapped = map_parameter(shape, split, name)
    return Sharded(mapped, tensors[: mapped.num_shards])


class _Inert:
    """Stands for an object of any other kind."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As a list's, for pickle."""

    def extend(self, values: Any) -> None:
        """As a list's, for pickle."""


class _TensorsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if _SAFE.fullmatch(f"{module} {name}") else _Inert
