"""What rules are made of."""

from __future__ import annotations

from typing import Any

from slime.config.base import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition`."""
    if not condition:
        raise ConfigError(message)


def first(*values: Any) -> Any:
    """The first that is not None; None where all are."""
    return next((value for value in values if value is not None), None)


def check_prompt_fits(kind: str, max_prompt_len: int | None, context: int | None) -> None:
    """Raise ConfigError where a prompt may fill the whole context. kind: "rollout" or "eval". Lengths in tokens."""
    require(
        max_prompt_len is None or context is None or max_prompt_len < context,
        f"--{kind}-max-prompt-len {max_prompt_len} must be below --{kind}-max-context-len {context}: a response needs "
        "at least one token.",
    )
