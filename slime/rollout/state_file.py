"""A state dict in one JSON file, written whole or not at all."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from slime.utils.files import write_text_atomically

_ARRAY_KEY = "__ndarray__"


def write_state(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path`, making its folder: the earlier file stays until the new one is on disk.

    Beside JSON's types numpy arrays are kept (tuples come back as lists). Raises ValueError naming the entry that
    would not come back as it is: an object of another type, a dict whose keys are no strings.
    """
    path = Path(path)
    _check_string_keys(state, path.name)
    try:
        text = json.dumps(state, default=_encode)
    except TypeError as error:
        raise ValueError(f"{path.name}: {error}") from error
    write_text_atomically(path, text)


def read_state(path: str | Path) -> dict[str, Any]:
    """The state that `write_state` wrote. Raises ValueError, with the path and the reason, if it is not that."""
    try:
        state = json.loads(Path(path).read_bytes(), object_hook=_decode)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a state file of slime ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a state file of slime (it holds a {type(state).__name__})")
    return state


def _check_string_keys(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {key!r} is a {type(key).__name__}; only string keys can be saved")
            if isinstance(entry, dict | list):
                _check_string_keys(entry, f"{where}[{key!r}]")
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):  # token lists are not walked
        for entry in value:
            _check_string_keys(entry, f"{where}[]")


def _encode(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_ARRAY_KEY: data, "dtype": value.dtype.str, "shape": value.shape}
    raise TypeError(f"a {type(value).__name__} cannot be saved: use JSON types or numpy arrays in a sample's fields")


def _decode(entry: dict[str, Any]) -> Any:
    if _ARRAY_KEY not in entry:
        return entry
    data = base64.b64decode(entry[_ARRAY_KEY])
    return np.frombuffer(data, dtype=entry["dtype"]).reshape(entry["shape"]).copy()
