"""How a request wants its tokens drawn: SGLang's `sampling_params`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1}
"""Parameters of SGLang's that this engine takes at their neutral value only."""

ABSENT_ONLY = ("regex", "json_schema", "ebnf", "structural_tag", "stop_regex", "logit_bias", "custom_params")
"""Parameters of SGLang's that this engine does not have."""

IGNORED = ("spaces_between_special_tokens", "stream_interval")

GREEDY_BELOW = 1e-6


@dataclass(slots=True)
class SamplingParams:
    """Checked sampling parameters; the defaults are SGLang's.

    A temperature of 0 is greedy: the most likely token, with log-probabilities at temperature 1.
    top_k: -1 is the whole vocabulary. sampling_seed: None lets the engine draw one.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    sampling_seed: int | None = None

    def __post_init__(self) -> None:
        _check(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _check(self.top_k == -1 or self.top_k >= 1, "top_k", self.top_k, "-1 (all) or at least 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _check(self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "at least 0")
        allowed = f"in [0, max_new_tokens({self.max_new_tokens})]"
        _check(0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", self.min_new_tokens, allowed)
        _check(self.n >= 1, "n", self.n, "at least 1")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1


def _check(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {value}.")


_TYPES: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "min_new_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "min_p": (int, float),
    "ignore_eos": (bool,),
    "skip_special_tokens": (bool,),
    "no_stop_trim": (bool,),
    "n": (int,),
    "sampling_seed": (int,),
}


def parse_sampling_params(body: object) -> SamplingParams:
    """The parameters of a JSON object; null means the default. Raises ValueError with one sentence."""
    if body is None:
        return SamplingParams()
    if not isinstance(body, dict):
        raise ValueError(f"sampling_params must be an object, got {type(body).__name__}.")
    values: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in _TYPES:
            values[name] = _typed(name, value)
        elif name == "stop":
            values[name] = _stop_strings(value)
        elif name == "stop_token_ids":
            values[name] = _stop_token_ids(value)
        elif name in NEUTRAL:
            _check(value == NEUTRAL[name], name, value, f"{NEUTRAL[name]}: the embedded engine has no penalties")
        elif name in ABSENT_ONLY:
            raise ValueError(f"sampling parameter {name!r} is not supported by the embedded engine.")
        else:
            raise ValueError(f"unknown sampling parameter {name!r}.")
    return SamplingParams(**values)


def _typed(name: str, value: Any) -> Any:
    types = _TYPES[name]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{name} must be {' or '.join(kind.__name__ for kind in types)}, got {value!r}.")
    return value


def _stop_strings(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise ValueError(f"stop must be a string or a list of strings, got {value!r}.")
    return [string for string in strings if string]


def _stop_token_ids(value: Any) -> frozenset[int]:
    if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
        raise ValueError(f"stop_token_ids must be a list of integers, got {value!r}.")
    return frozenset(value)
