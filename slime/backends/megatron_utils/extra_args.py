"""Flags of a user's own, which an `extra_args_provider` adds as it would for Megatron-LM."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slime.config.base import ConfigError, flag_of
from slime.config.flags import FlagParser

ExtraArgsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
"""Adds flags to a parser and returns it."""

_DOCUMENTED_MODULE, _DOCUMENTED_NAME = "pretrain_gpt", "extra_args_provider"


def documented_provider() -> ExtraArgsProvider | None:
    """`extra_args_provider` of the module `pretrain_gpt`, where there is one; only then that module is imported."""
    found = importlib.util.find_spec(_DOCUMENTED_MODULE)
    if found is None or found.origin is None or not _defines(Path(found.origin).read_text(), _DOCUMENTED_NAME):
        return None
    try:
        provider: ExtraArgsProvider = getattr(importlib.import_module(_DOCUMENTED_MODULE), _DOCUMENTED_NAME)
    except ImportError as error:
        raise ConfigError(f"{found.origin} has an {_DOCUMENTED_NAME}, but cannot be imported: {error}.") from error
    return provider


def _defines(source: str, name: str) -> bool:
    """Whether a module binds `name` itself."""
    body = ast.parse(source).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    assigned = {n.id for node in body if isinstance(node, ast.Assign) for n in node.targets if isinstance(n, ast.Name)}
    imports = (node.names for node in body if isinstance(node, ast.ImportFrom))
    return name in functions | assigned | {alias.asname or alias.name for names in imports for alias in names}


def own_settings(
    words: list[str], provider: ExtraArgsProvider, declared: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """The user's settings with their defaults, and the words that are left. declared: names that slime has.

    Raises ConfigError where a setting has the name of one of slime's, an ill-typed value, or none that a file can hold.
    """
    parser = FlagParser(prog="slime train", allow_abbrev=False, add_help=False)
    provider(parser)
    namespace, rest = parser.parse_known_args(words)
    settings = vars(namespace)
    for name, value in settings.items():
        if name in set(declared):
            raise ConfigError(f"The extra_args_provider adds {flag_of(name)}, which slime has: choose another name.")
        try:
            json.dumps(value)
        except TypeError as error:
            raise ConfigError(
                f"{flag_of(name)}, of the extra_args_provider, must be text or a number: {error}."
            ) from error
    return settings, rest
