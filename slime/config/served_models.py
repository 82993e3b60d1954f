"""The file of --sglang-config: which models engines serve, and in which groups of engines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from slime.config.base import ConfigError
from slime.config.flags import read_config_file

WORKER_TYPES = ("regular", "prefill", "decode", "placeholder")
POLICY = "actor"  # the name by which plug-ins ask for the policy, whatever the file calls it
_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # of a model: a part of file names
_MODEL_KEYS = {"name", "model_path", "update_weights", "num_gpus_per_engine", "server_groups"}
_GROUP_KEYS = {"worker_type", "num_gpus", "num_gpus_per_engine", "overrides"}


@dataclass(frozen=True)
class ServerGroup:
    """Engines of one kind on `num_gpus` slots. worker_type: placeholder leaves its slots without engines.

    overrides: settings of the engine by name, which win over --sglang-X.
    """

    worker_type: str
    num_gpus: int
    num_gpus_per_engine: int
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def num_engines(self) -> int:
        """Engines that are started."""
        return 0 if self.worker_type == "placeholder" else self.num_gpus // self.num_gpus_per_engine


@dataclass(frozen=True)
class ServedModel:
    """One model behind a router of its own. update_weights: it is the policy; else it stays as `model_path` has it."""

    name: str
    model_path: str
    update_weights: bool
    groups: tuple[ServerGroup, ...]

    @property
    def num_engines(self) -> int:
        """Engines of all its groups."""
        return sum(group.num_engines for group in self.groups)

    @property
    def num_gpus(self) -> int:
        """Slots of its engines; placeholders have none."""
        return sum(group.num_engines * group.num_gpus_per_engine for group in self.groups)

    @property
    def is_disaggregated(self) -> bool:
        """Whether some of its engines compute prompts only."""
        return any(group.worker_type == "prefill" for group in self.groups)


def read_served_models(path: str, *, checkpoint: str, num_gpus_per_engine: int) -> tuple[ServedModel, ...]:
    """The models of a YAML file, in its order, which is that of their slots.

    checkpoint, num_gpus_per_engine: --hf-checkpoint and its like, for what the file does not say.
    Raises ConfigError with the place in the file.
    """
    read = read_config_file(path, "--sglang-config")
    source = f"--sglang-config: {path}"
    if set(read) != {"sglang"}:
        raise ConfigError(f"{source}: must hold one key, sglang, got {', '.join(sorted(read)) or 'none'}.")
    entries = _list(read["sglang"], f"{source}: sglang")
    models = tuple(
        _model(entry, f"{source}: sglang[{place}]", checkpoint, num_gpus_per_engine)
        for place, entry in enumerate(entries)
    )
    _check_models(models, source)
    return models


def _check_models(models: Sequence[ServedModel], source: str) -> None:
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"{source}: two models have one name: {', '.join(names)}.")
    trained = [model.name for model in models if model.update_weights]
    if len(trained) != 1:
        raise ConfigError(
            f"{source}: one model must take the weights that are trained (update_weights), got "
            f"{' and '.join(trained) or 'none'}: a model with no model_path, or that of --hf-checkpoint, is the one."
        )
    if POLICY in names and POLICY not in trained:
        raise ConfigError(f"{source}: the name {POLICY} is that of the policy: give the model that stays another.")


def _model(entry: Any, place: str, checkpoint: str, num_gpus_per_engine: int) -> ServedModel:
    table = _table(entry, place, _MODEL_KEYS)
    name = table.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{place}: name must be letters, digits, '_', '.' and '-', got {name!r}.")
    place = f"{place} ({name})"
    model_path = table.get("model_path", checkpoint)
    if not isinstance(model_path, str):
        raise ConfigError(f"{place}: model_path must be a directory, got {model_path!r}.")
    update_weights = table.get("update_weights", model_path == checkpoint)
    if not isinstance(update_weights, bool):
        raise ConfigError(f"{place}: update_weights must be true or false, got {update_weights!r}.")
    if update_weights and model_path != checkpoint:
        raise ConfigError(f"{place}: update_weights needs the model that is trained: drop model_path {model_path}.")
    size = _size(table, "num_gpus_per_engine", place, num_gpus_per_engine)
    entries = _list(table.get("server_groups"), f"{place}: server_groups")
    groups = tuple(_group(entry, f"{place}: server_groups[{index}]", size) for index, entry in enumerate(entries))
    _check_groups(groups, place, is_policy=update_weights)
    return ServedModel(name, model_path, update_weights, groups)


def _check_groups(groups: Sequence[ServerGroup], place: str, *, is_policy: bool) -> None:
    types = {group.worker_type for group in groups} - {"placeholder"}
    if types not in ({"regular"}, {"prefill", "decode"}):
        got = " and ".join(sorted(types)) or "none"
        raise ConfigError(f"{place}: server_groups must be regular, or prefill and decode, got {got}.")
    if is_policy and any("context_length" in group.overrides for group in groups):
        raise ConfigError(f"{place}: the context of the policy is one for all: use --sglang-context-length.")


def _group(entry: Any, place: str, num_gpus_per_engine: int) -> ServerGroup:
    table = _table(entry, place, _GROUP_KEYS)
    worker_type = table.get("worker_type")
    if worker_type not in WORKER_TYPES:
        raise ConfigError(f"{place}: worker_type must be one of {', '.join(WORKER_TYPES)}, got {worker_type!r}.")
    num_gpus = _size(table, "num_gpus", place, None)
    size = _size(table, "num_gpus_per_engine", place, num_gpus_per_engine)
    if worker_type != "placeholder" and num_gpus % size:
        raise ConfigError(f"{place}: num_gpus_per_engine {size} must divide num_gpus {num_gpus}.")
    overrides = table.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise ConfigError(f"{place}: overrides must be a table of SGLang's settings, got {overrides!r}.")
    return ServerGroup(worker_type, num_gpus, size, {str(key).replace("-", "_"): overrides[key] for key in overrides})


def _table(entry: Any, place: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: must be a table, got {entry!r}.")
    unknown = sorted(map(str, set(entry) - known))
    if unknown:
        raise ConfigError(f"{place}: unknown key {unknown[0]}; there are {', '.join(sorted(known))}.")
    return entry


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{place}: must be a list with an entry at least, got {value!r}.")
    return value


def _size(table: dict[str, Any], key: str, place: str, default: int | None) -> int:
    value = table.get(key, default)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{place}: {key} must be a whole number above 0, got {value!r}.")
    return value


def groups_of(models: Sequence[ServedModel]) -> Iterator[tuple[ServedModel, ServerGroup]]:
    """Every group of engines with its model, in the order of their slots."""
    return ((model, group) for model in models for group in model.groups)
