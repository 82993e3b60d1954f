"""A state dict in one JSON file, written whole or not at all."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from slime.utils.files import write_text_atomically

_PACKED = "__packed__"  # {"__packed__": base64 of the bytes, "dtype": numpy's, "shape": null for a list}
_SHORTEST_PACKED = 32  # numbers: below that a list stays readable
_DTYPE_OF_NUMBER: dict[type, type] = {int: np.int64, float: np.float64}


def write_state(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path`, making its folder: the earlier file stays until the new one is on disk.

    Takes JSON's types (a tuple comes back as a list) and numpy arrays; long lists of numbers, such as tokens and
    log-probs, are packed, exactly. Raises ValueError naming the entry that would not come back as it is.
    """
    path = Path(path)
    write_text_atomically(path, json.dumps(_pack(state, path.name)))


def read_state(path: str | Path) -> dict[str, Any]:
    """The state that `write_state` wrote. Raises ValueError, with the path and the reason, if it is not that."""
    try:
        state = json.loads(Path(path).read_bytes(), object_hook=_unpack)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a state file of slime ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a state file of slime (it holds a {type(state).__name__})")
    return state


def _pack(value: Any, where: str) -> Any:
    """`value` in JSON's types. where: its place in the state, for the error."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {_checked_key(key, where): _pack(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return _pack_numbers(value) or [_pack(entry, f"{where}[]") for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _packed(value, value.shape)
    raise ValueError(f"{where}: a {type(value).__name__} cannot be saved, only JSON's types and numpy arrays can")


def _checked_key(key: Any, where: str) -> str:
    if not isinstance(key, str) or key == _PACKED:
        raise ValueError(f"{where}: the key {key!r} cannot be saved, keys must be strings other than {_PACKED!r}")
    return key


def _pack_numbers(values: list[Any] | tuple[Any, ...]) -> dict[str, Any] | None:
    """A long list of only ints or only floats as bytes; None for any other."""
    if len(values) < _SHORTEST_PACKED:
        return None
    types = set(map(type, values))
    dtype = _DTYPE_OF_NUMBER.get(types.pop()) if len(types) == 1 else None
    if dtype is None:
        return None
    try:
        return _packed(np.array(values, dtype=dtype), None)
    except OverflowError:  # an int of more than 64 bits: JSON can do it
        return None


def _packed(array: np.ndarray[Any, Any], shape: tuple[int, ...] | None) -> dict[str, Any]:
    return {_PACKED: base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": shape}


def _unpack(entry: dict[str, Any]) -> Any:
    if _PACKED not in entry:
        return entry
    array = np.frombuffer(base64.b64decode(entry[_PACKED]), dtype=entry["dtype"])
    return array.tolist() if entry["shape"] is None else array.reshape(entry["shape"]).copy()
