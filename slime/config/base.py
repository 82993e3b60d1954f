"""The base of the settings groups and the declaration of one field."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from string import Formatter
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the flag, the value and what to do."""


def arg(default: Any, help: str, *, alias: str | None = None, disable: str | None = None, repeats: bool = False) -> Any:
    """Declare one setting: its default, its help line and its documented other names.

    alias: a second flag with the same meaning, such as `--rollout-stop-strings`.
    disable: for a bool that is True by default, a documented flag that turns it off, such as `--disable-x`.
    repeats: for a list, a flag that is given again adds to it instead of replacing it.
    """
    metadata = {"help": help, "alias": alias, "disable": disable, "repeats": repeats}
    if isinstance(default, (list, dict)):
        return field(default_factory=partial(type(default), default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Base of all groups. A subclass checks its own fields in `__post_init__` and calls `super().__post_init__()`."""

    def __post_init__(self) -> None:
        """End of the cooperative chain: what holds for every field."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            check(not isinstance(value, float) or math.isfinite(value), item.name, "a finite number", value)


def flag_of(name: str) -> str:
    """The flag of a field: `rollout_batch_size` -> `--rollout-batch-size`."""
    return "--" + name.replace("_", "-")


def check(condition: bool, name: str, requirement: str, value: object) -> None:
    """Raise ConfigError "--flag must be REQUIREMENT, got VALUE" unless `condition`."""
    if not condition:
        raise ConfigError(f"{flag_of(name)} must be {requirement}, got {value!r}.")


def check_positive(group: Group, *names: str) -> None:
    """Every named field that is set must be above zero."""
    for name in names:
        value = getattr(group, name)
        check(value is None or value > 0, name, "above 0", value)


def check_template(group: Group, name: str, *places: str) -> None:
    """A path that is set must have each of `places`, such as {rollout_id}, and no other."""
    path = getattr(group, name)
    if path is not None:
        wanted = " and ".join(f"{{{place}}}" for place in places)
        check(_places(path) == set(places), name, f"a path in which {wanted} is filled in", path)


def _places(path: str) -> set[str]:
    try:
        return {place for _, place, _, _ in Formatter().parse(path) if place is not None}
    except ValueError:  # a brace that is not closed
        return set()


def check_not_negative(group: Group, *names: str) -> None:
    """Every named field that is set must be zero or more."""
    for name in names:
        value = getattr(group, name)
        check(value is None or value >= 0, name, "0 or more", value)
