"""The model's weights under checkpoint names: updated in place, compared, released and taken again.

A checkpoint may name tensors otherwise than the module does (transformers holds the experts of a layer fused,
checkpoints name them singly). Its own conversion rules say which tensors make one parameter; those wait until they are
complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import PreTrainedModel

from slime.utils.checksum import tensor_checksum
from slime.utils.mtp import mtp_names


class WeightsRefused(ValueError):
    """The offered tensors do not fit the model; the message names the first that does not."""


class _Place(NamedTuple):
    """Where a checkpoint's tensor goes: the parameter and, if several tensors make it, the rule's pattern."""

    parameter: str
    pattern: str | None


class ModelWeights:
    """The weights of one model. `source` is the folder that holds what the model holds, if one does."""

    def __init__(self, model: PreTrainedModel, source: str) -> None:
        self._model = model
        self._source: str | None = source
        transforms = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model)
        self._renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
        self._converters = {
            pattern: rule
            for rule in transforms
            if isinstance(rule, WeightConverter)
            for pattern in rule.source_patterns
        }
        self._aliases = _aliases(model)
        self._is_mtp = mtp_names(model.config.to_dict()).fullmatch
        self._parameter_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.shapes = self._checkpoint_shapes()
        self._parts: dict[str, int] = {}
        for name in self.shapes:
            place = self._place(name)
            self._parts[place.parameter] = self._parts.get(place.parameter, 0) + 1
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._stale: set[str] = set()
        self._is_released = False

    # updates

    def check(self, shapes: dict[str, torch.Size], *, origin: str, complete: bool) -> None:
        """Raises WeightsRefused unless each named shape is the model's and, for `complete`, none is missing."""
        for name, shape in shapes.items():
            known = self._shape(name)
            if known is None:
                raise WeightsRefused(f"{origin}: the model has no tensor {name!r}.")
            if tuple(known) != tuple(shape):
                raise WeightsRefused(
                    f"{origin}: tensor {name!r} has shape {list(shape)}, the model's is {list(known)}."
                )
        if complete:
            given = {self._place(name).parameter for name in shapes}
            for name in self.shapes:
                if name not in shapes and (self._place(name).pattern or self._place(name).parameter not in given):
                    raise WeightsRefused(f"{origin}: tensor {name!r} is missing.")

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies checked tensors into the model; parts of one parameter wait for each other, across calls too."""
        if self._is_released:
            raise WeightsRefused("weights are released; POST /resume_memory_occupation first.")
        self._source = None
        parameters = self._model.state_dict()
        for name, tensor in tensors:
            place = self._place(name)
            if place.pattern is None:
                self._store(parameters, place.parameter, tensor)
                continue
            parts = self._waiting.setdefault(place.parameter, {})
            parts[name] = tensor.clone()
            if len(parts) == self._parts[place.parameter]:
                self._convert(parameters, place, self._waiting.pop(place.parameter))

    def load_from_disk(self, folder: str) -> None:
        """Reads a checkpoint's safetensors. Raises WeightsRefused, with nothing changed, if they do not fit."""
        files = checkpoint_files(folder)
        shapes: dict[str, torch.Size] = {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in self._names(file)}
            except (SafetensorError, OSError) as error:
                raise WeightsRefused(f"{path} cannot be read: {error}") from error
        self.check(shapes, origin=folder, complete=True)
        self._waiting.clear()
        for path in files:
            with safe_open(path, "pt") as file:
                self.load((name, file.get_tensor(name)) for name in self._names(file))
        self._source = folder

    # memory

    def release(self) -> None:
        """Frees the memory of all parameters."""
        for parameter in self._model.parameters():
            parameter.data = parameter.data.new_empty(0)
        self._waiting.clear()
        self._is_released = True

    def resume(self) -> None:
        """Takes memory for all parameters again; what they hold is to be sent, or read again when first needed."""
        if not self._is_released:
            return
        for name, parameter in self._model.named_parameters():
            parameter.data = parameter.data.new_empty(self._parameter_shapes[name])
        self._stale = {self._place(name).parameter for name in self.shapes}
        self._is_released = False

    def reason_unusable(self) -> str | None:
        """Why the model cannot run now, if it cannot."""
        if self._is_released:
            return "weights are released; POST /resume_memory_occupation first"
        if self._stale and self._source is None:
            return f"weights were released and {len(self._stale)} tensors not sent since, such as {min(self._stale)!r}"
        if self._waiting:
            name, parts = next(iter(self._waiting.items()))
            return f"weights are incomplete: {name!r} has {len(parts)} of its {self._parts[name]} tensors"
        return None

    def ensure_loaded(self) -> None:
        """Reads the weights again if they were released and nothing was sent since."""
        if self._stale and self._source is not None:
            self.load_from_disk(self._source)

    # inspection

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """All tensors under checkpoint names."""
        state = {name: tensor for name, tensor in self._model.state_dict().items() if name not in self._aliases}
        yield from revert_weight_conversion(self._model, state).items()

    def checksums(self) -> dict[str, str]:
        """The checksum of each tensor, under checkpoint names."""
        return {name: tensor_checksum(tensor) for name, tensor in self.named_tensors()}

    def tensor(self, name: str) -> Tensor:
        """The tensor of a checkpoint or module name. Raises WeightsRefused where there is none."""
        state = self._model.state_dict()
        if name in state:
            return state[name]
        for known, tensor in self.named_tensors():
            if known == name:
                return tensor
        raise WeightsRefused(f"the model has no tensor {name!r}.")

    # internals

    def _store(self, parameters: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        parameters[name].copy_(tensor)
        self._stale.discard(self._aliases.get(name, name))

    def _convert(self, parameters: dict[str, Tensor], place: _Place, parts: dict[str, Tensor]) -> None:
        """Makes one parameter of its parts by transformers' rule."""
        rules: dict[str, WeightConverter] = {}
        for name in sorted(parts, key=dot_natural_key):
            pattern = self._place(name).pattern
            assert pattern is not None
            rule = rules.setdefault(place.parameter, deepcopy(self._converters[pattern]))
            rule.add_tensor(place.parameter, name, pattern, cast(Any, parts[name]))  # takes tensors as well as futures
        for rule in rules.values():
            made = rule.convert(place.parameter, model=self._model, config=self._model.config)
            for name, value in made.items():
                self._store(parameters, name, value[0] if isinstance(value, list) else value)
        self._stale.discard(place.parameter)

    def _names(self, file: Any) -> list[str]:
        """The names in an open safetensors file, but for layers for multi-token prediction, which no model here has."""
        names: list[str] = file.keys()  # of what is no mapping
        return [name for name in names if not self._is_mtp(name)]

    def _place(self, name: str) -> _Place:
        if name in self._parameter_shapes:
            return _Place(self._aliases.get(name, name), None)
        converters = list({id(rule): rule for rule in self._converters.values()}.values())
        known = dict.fromkeys(self._parameter_shapes)
        renamed, pattern = rename_source_key(name, self._renamings, converters, self._model.base_model_prefix, known)
        return _Place(self._aliases.get(renamed, renamed), pattern)

    def _shape(self, name: str) -> torch.Size | None:
        return self.shapes.get(name, self._parameter_shapes.get(name)) or self._parameter_shapes.get(
            self._place(name).parameter
        )

    def _checkpoint_shapes(self) -> dict[str, torch.Size]:
        meta = {
            name: torch.empty(shape, device="meta")
            for name, shape in self._parameter_shapes.items()
            if name not in self._aliases
        }
        return {name: tensor.shape for name, tensor in revert_weight_conversion(self._model, meta).items()}


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    """Names of tied tensors, each with the name that their shared memory is known by."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases


def checkpoint_files(folder: str) -> list[Path]:
    """The safetensors files of a checkpoint folder. Raises WeightsRefused where there are none."""
    root = Path(folder)
    if not root.is_dir():
        raise WeightsRefused(f"{folder} is not a folder.")
    index = root / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in root.glob("*.safetensors"))
    if not names:
        raise WeightsRefused(f"{folder} holds no safetensors file.")
    return [root / name for name in names]
