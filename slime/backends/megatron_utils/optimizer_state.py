"""An optimizer's state as a checkpoint holds it, also where some layers, or all that a rank holds, are not trained.

Megatron keeps an optimizer for experts beside that for other parameters where ranks share experts, else one for all. A
file knows tensors by the names of their parameters, so that each layout finds those of another; groups of parameters,
which belong to a layout, are the reader's own, with the number of steps that the file says.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

State = dict[Any, Any]
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_LISTS = "fp32_from_fp16_params"  # for each group of parameters a list of tensors
_TENSOR = object()  # where an outline has a tensor


def sharded(optimizer: Any, weights: State, *, is_loading: bool = False) -> State:
    """The state with each tensor's place in the whole, which is that of its parameter in `weights`.

    Dicts stand for its lists: Megatron merges no lists of which a rank has fewer entries than another.
    """
    return _numbered(optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_METADATA))


def tensors_in(state: State) -> State:
    """Of what `sharded` described, the tensors alone, where they stand: what a file is asked for."""
    parts = {key: tensors_in(value) for key, value in state.items() if isinstance(value, dict)}
    tensors = {key: value for key, value in state.items() if isinstance(value, ShardedBase)}
    return {key: part for key, part in parts.items() if part} | tensors


def outline(state: Any) -> Any:
    """All else of it, to be made a state by `complete`."""
    match state:
        case dict():
            return {key: outline(value) for key, value in state.items()}
        case list():
            return [outline(value) for value in state]
        case LocalNonpersistentObject():
            return state.unwrap()
        case ShardedBase():
            return _TENSOR
    return state


def complete(own: State, loaded: State) -> State:
    """A state as the optimizer knows it. own: its `outline`. loaded: the tensors, and whatever else the file says."""
    state = _listed(_filled(own, loaded))
    steps = [group["step"] for part in _parts(loaded) for group in _groups(part) if "step" in group]
    scalers = [part["grad_scaler"] for part in _parts(loaded) if "grad_scaler" in part]
    for part in _parts(state):
        for group in _groups(part) if steps else ():
            group["step"] = copy.deepcopy(steps[0])
        if "grad_scaler" in part and scalers:
            part["grad_scaler"] = scalers[0]
    return state


def _filled(own: Any, loaded: Any) -> Any:
    if own is _TENSOR:
        return loaded
    if not isinstance(own, dict):
        return own
    return {key: _filled(value, loaded.get(key, {}) if isinstance(loaded, dict) else {}) for key, value in own.items()}


def _parts(state: State) -> list[State]:
    """The states in which groups may stand: that of one optimizer, or of each."""
    return [state, *(part for number, part in state.items() if isinstance(number, int))]


def _groups(part: State) -> list[State]:
    groups: list[State] = part.get("optimizer", part).get("param_groups", [])
    return groups


def _numbered(state: State) -> State:
    changed = {key: _numbered(value) for key, value in state.items() if isinstance(value, dict)}
    if _LISTS in state:
        changed[_LISTS] = {number: dict(enumerate(group)) for number, group in enumerate(state[_LISTS])}
    return state | changed


def _listed(state: State) -> State:
    changed: State = {key: _listed(value) for key, value in state.items() if isinstance(value, dict)}
    if _LISTS in state:
        changed[_LISTS] = [
            [tensor for _, tensor in sorted(group.items())] for _, group in sorted(state[_LISTS].items())
        ]
    return state | changed
