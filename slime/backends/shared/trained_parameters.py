"""Which parameters a run trains: --only-train-params-name-list and --freeze-params-name-list, for both backends."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from slime.config import OptimizerConfig


def trained_names(parts: Mapping[str, tuple[str, ...]], cfg: OptimizerConfig) -> set[str]:
    """Those of the names of `parts` that the settings leave to train.

    parts: a parameter's name, and further names of what it is made of: a pattern that is found in one of these must be
    found in all. Raises ValueError where it is not, where no parameter is meant, or none is left to train.
    """
    patterns = cfg.only_train_params_name_list or cfg.freeze_params_name_list or []
    if not patterns:
        return set(parts)
    flag = "--only-train-params-name-list" if cfg.only_train_params_name_list else "--freeze-params-name-list"
    said = f"{flag} {' '.join(patterns)}"
    matching = {name for name, others in parts.items() if _is_meant(name, others, patterns, said)}
    if not matching:
        raise ValueError(f"{said} matches none of {', '.join(itertools.islice(parts, 3))}, ...")
    trained = matching if cfg.only_train_params_name_list else parts.keys() - matching
    if not trained:
        raise ValueError(f"{said} leaves no parameter to train")
    return trained


def _is_meant(name: str, others: tuple[str, ...], patterns: list[str], said: str) -> bool:
    if _is_found(name, patterns):
        return True
    found = [other for other in others if _is_found(other, patterns)]
    if found and len(found) < len(others):
        rest = next(other for other in others if other not in found)
        raise ValueError(f"{said} matches {found[0]} but not {rest}: both are in one parameter of Megatron, {name}")
    return bool(found)


def _is_found(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
