"""Flags of Megatron that slime does not declare: those that describe the model, and those of a Megatron-LM checkout."""

from __future__ import annotations

import argparse
from typing import Any

from slime.backends.megatron_utils.find import Megatron
from slime.backends.megatron_utils.model_arguments import MODEL_FLAGS, check_given, given_flags
from slime.backends.megatron_utils.names import read_shape
from slime.config.base import ConfigError
from slime.config.flags import unknown_flag_error

# Of Megatron's own attention and kernels; slime's have one way.
KERNELS = frozenset({"--attention-softmax-in-fp32", "--attention-backend", "--no-rope-fusion"})
# slime counts positions by the sequences that come, and pads the vocabulary as the ranks want it.
IGNORED = frozenset({"--seq-length", "--max-position-embeddings", "--make-vocab-size-divisible-by"})


def further_settings(words: list[str], megatron: Megatron, hf_checkpoint: str) -> dict[str, Any]:
    """What `words`, which no group of slime declares, set in Megatron, by the names of its configurations.

    Model arguments are compared with config.json and set nothing. Raises ConfigError for a flag that nobody knows, or
    one that contradicts config.json.
    """
    try:
        given = given_flags(words)
        if given.keys() & MODEL_FLAGS:
            check_given(read_shape(hf_checkpoint), given)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    further = _without(words, MODEL_FLAGS | IGNORED | (frozenset() if megatron.has_training else KERNELS))
    if not further:
        return {}
    if not megatron.has_training:
        raise unknown_flag_error(f"{further[0].partition('=')[0]} ({megatron})", MODEL_FLAGS)
    return _parsed(further)


def _without(words: list[str], flags: frozenset[str]) -> list[str]:
    """`words` without these flags and their values."""
    kept, is_kept = [], True
    for word in words:
        if word.startswith("--"):
            is_kept = not given_flags([word]).keys() <= flags
        kept += [word] * is_kept
    return kept


def _parsed(words: list[str]) -> dict[str, Any]:
    """What the parser of Megatron-LM makes of `words`, without its defaults."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_megatron_arguments(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    try:
        namespace, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(f"Megatron-LM: {error}.") from error
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise unknown_flag_error(unknown[0].partition("=")[0], known)
    return vars(namespace)
