"""Pickled tensors: unpacked, and nothing but tensors."""

from __future__ import annotations

import base64
import os
import pickle

import pytest
import torch
from helpers.weight_senders import serialize

from slime.engine.embedded.weight_transport import UpdateGroups, unpack_tensors
from slime.engine.embedded.weights import WeightsRefused

TENSORS = [
    ("a", torch.randn(3, 4)),
    ("b", torch.arange(5, dtype=torch.int8)),
    ("c", torch.randn(2, 3).to(torch.bfloat16)),
    ("d", torch.tensor(2.5)),
]


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_tensors_come_out_as_they_went_in(load_format: str | None) -> None:
    unpacked = unpack_tensors(serialize(TENSORS, load_format), load_format)
    assert [name for name, _ in unpacked] == ["a", "b", "c", "d"]
    for (_, tensor), (_, expected) in zip(unpacked, TENSORS, strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> object:
        return self._call


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, torch.load, torch.hub.load, getattr])
def test_a_pickle_that_names_code_is_refused(function: object) -> None:
    payload = base64.b64encode(pickle.dumps(Malicious(function, "1"))).decode()
    with pytest.raises(WeightsRefused, match="may hold tensors only"):
        unpack_tensors(payload, None)


@pytest.mark.parametrize("payload", ["%%%", base64.b64encode(b"junk").decode(), ""])
def test_what_is_no_pickle_is_refused(payload: str) -> None:
    with pytest.raises(WeightsRefused, match="cannot be read"):
        unpack_tensors(payload, None)


def test_what_holds_no_tensors_is_refused() -> None:
    with pytest.raises(WeightsRefused, match="list of"):
        unpack_tensors(base64.b64encode(pickle.dumps({"a": 1})).decode(), None)
    with pytest.raises(WeightsRefused, match="flattened_tensor"):
        unpack_tensors(base64.b64encode(pickle.dumps([])).decode(), "flattened_bucket")
    with pytest.raises(WeightsRefused, match="load_format"):
        unpack_tensors(base64.b64encode(pickle.dumps([])).decode(), "other")


def test_an_unknown_group_is_refused() -> None:
    groups = UpdateGroups(torch.device("cpu"))
    with pytest.raises(WeightsRefused, match="init_weights_update_group"):
        groups.receive("nobody", ["a"], ["float32"], [[1]], flattened=False)
    with pytest.raises(WeightsRefused, match="no weight-update group"):
        groups.leave("nobody")
