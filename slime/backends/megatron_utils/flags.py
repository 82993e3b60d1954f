"""Flags of Megatron that slime does not declare: those that describe the model, and those of a Megatron-LM checkout."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from slime.backends.megatron_utils.find import Megatron
from slime.backends.megatron_utils.model_arguments import MODEL_FLAGS, check_given, given_flags
from slime.backends.megatron_utils.names import read_shape
from slime.config.base import ConfigError, flag_of
from slime.config.flags import unknown_flag_error

logger = logging.getLogger(__name__)

# Of Megatron's own attention and kernels; slime's have one way.
KERNELS = frozenset({"--attention-softmax-in-fp32", "--attention-backend", "--no-rope-fusion"})
# slime counts positions by the sequences that come, and pads the vocabulary as the ranks want it.
LENGTHS = ("seq_length", "max_position_embeddings")
IGNORED = frozenset(map(flag_of, LENGTHS)) | {"--make-vocab-size-divisible-by"}


class Further(NamedTuple):
    """fields: settings of Megatron by the names of its configurations. others: what plug-ins may read of `args`."""

    fields: dict[str, Any]
    others: dict[str, Any]


def further_settings(words: list[str], megatron: Megatron, hf_checkpoint: str, known: Iterable[str] = ()) -> Further:
    """What `words`, which no group of slime declares, set.

    Model arguments are compared with config.json and set nothing; lengths are for plug-ins to read. known: flags that
    may have been meant. Raises ConfigError for a flag that nobody knows, or one that contradicts config.json.
    """
    try:
        given = given_flags(words)
        if given.keys() & MODEL_FLAGS:
            check_given(read_shape(hf_checkpoint), given)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    lengths = {name: _length(name, given[flag_of(name)]) for name in LENGTHS if flag_of(name) in given}
    further = _without(words, MODEL_FLAGS | IGNORED | (frozenset() if megatron.has_training else KERNELS))
    if not further:
        return Further({}, lengths)
    if not megatron.has_training:
        raise unknown_flag_error(f"{further[0].partition('=')[0]} ({megatron})", MODEL_FLAGS)
    fields, others = _sorted(_parsed(further, megatron, known))
    return Further(fields, lengths | others)


def _length(name: str, value: str | bool) -> int:
    if not str(value).isdecimal():
        raise ConfigError(f"{flag_of(name)} must be a number of tokens, got {value!r}.")
    return int(value)


def _without(words: list[str], flags: frozenset[str]) -> list[str]:
    """`words` without these flags and their values."""
    kept, is_kept = [], True
    for word in words:
        if word.startswith("--"):
            is_kept = not given_flags([word]).keys() <= flags
        kept += [word] * is_kept
    return kept


def megatron_parser() -> argparse.ArgumentParser:
    """The parser of the Megatron-LM that is found, with all its flags. Raises ImportError where it lacks something."""
    from megatron.training.arguments import parse_args

    parsers: list[argparse.ArgumentParser] = []

    def take(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(parser)
        raise _Taken

    with contextlib.suppress(_Taken):
        parse_args(take)
    return parsers[0]


class _Taken(Exception):
    """Ends Megatron's `parse_args` before it reads the command line."""


def _parsed(words: list[str], megatron: Megatron, known: Iterable[str]) -> dict[str, Any]:
    """What the parser of Megatron-LM makes of `words`, without its defaults."""
    name = words[0].partition("=")[0]
    try:
        parser = megatron_parser()
    except ImportError as error:
        raise ConfigError(f"{name} may be a flag of {megatron}, whose parser cannot be imported: {error}.") from error
    parser.exit_on_error = False
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    try:
        namespace, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(f"Megatron-LM: {error}.") from error
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise unknown_flag_error(unknown[0].partition("=")[0], [*known, *flags])
    return vars(namespace)


def _sorted(parsed: dict[str, Any]) -> Further:
    """Says which of the settings have no effect."""
    from slime.backends.megatron_utils.effects import as_fields, has_effect

    named = as_fields(parsed)
    fields = {name: value for name, value in named.items() if has_effect(name)}
    others = {name: value for name, value in named.items() if name not in fields}
    if others:
        logger.warning(
            "without effect, for they belong to parts of Megatron-LM that slime does not use: %s",
            ", ".join(map(flag_of, sorted(others))),
        )
    return Further(fields, others)
