"""An optimizer's state as a checkpoint holds it, also where some layers, or all that a rank holds, are not trained."""

from __future__ import annotations

from typing import Any

State = dict[Any, Any]
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_LISTS = "fp32_from_fp16_params"  # for each group of parameters a list of tensors


def sharded(optimizer: Any, weights: State, *, is_loading: bool = False) -> State:
    """The state with each tensor's place in the whole, which is that of its parameter in `weights`.

    Dicts stand for its lists: Megatron merges no lists of which a rank has fewer entries than another.
    """
    return _numbered(optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_METADATA))


def empty_parts(state: State) -> State:
    """The dicts in `state` that hold nothing, where they stand: Megatron loads none of them."""
    parts = {key: empty_parts(value) for key, value in state.items() if isinstance(value, dict)}
    return {key: part for key, part in parts.items() if part or not state[key]}


def complete(loaded: State, empty: State) -> State:
    """What `sharded` described, loaded, as the optimizer knows it. empty: `empty_parts` of what was wanted."""
    return _listed(_filled(loaded, empty))


def _filled(state: State, empty: State) -> State:
    for key, inner in empty.items():
        _filled(state.setdefault(key, {}), inner)
    return state


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
