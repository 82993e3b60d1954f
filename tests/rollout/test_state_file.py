import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.rollout.state_file import read_state, write_state


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"i": 2**70, "f": [0.1, 1e-300, float("-inf")], "s": "a\nü", "n": None, "nested": [{"b": True}]}
    write_state(tmp_path / "new" / "state.pt", state)
    assert read_state(tmp_path / "new" / "state.pt") == state


@given(
    numbers=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=40)
    | st.lists(st.floats(allow_nan=False), min_size=40)
    | st.lists(st.integers() | st.floats(allow_nan=False) | st.booleans(), min_size=40, max_size=60)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_long_lists_of_numbers_keep_every_value_and_type(tmp_path, numbers):
    write_state(tmp_path / "state.pt", {"numbers": numbers})
    back = read_state(tmp_path / "state.pt")["numbers"]
    assert back == numbers and list(map(type, back)) == list(map(type, numbers))


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.int16).reshape(2, 3).T, np.zeros((0, 4)), np.array(1.5)])
def test_arrays_keep_values_type_and_shape(tmp_path, array):
    write_state(tmp_path / "state.pt", {"array": array})
    back = read_state(tmp_path / "state.pt")["array"]
    assert back.dtype == array.dtype and np.array_equal(back, array) and back.shape == array.shape


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"a": {"b": object()}}, r"state.pt\['a'\]\['b'\]: a object cannot be saved"),
        ({"a": [0, {"b": {1: 2}}]}, r"\['a'\]\[\]\['b'\]: the key 1 cannot be saved"),
        ({"a": {"__packed__": 1}}, "the key '__packed__' cannot be saved"),
        ({"a": np.array([object()])}, "a ndarray cannot be saved"),
    ],
)
def test_what_would_not_come_back_is_refused_and_the_earlier_file_stays(tmp_path, state, reason):
    path = tmp_path / "state.pt"
    write_state(path, {"a": 1})
    with pytest.raises(ValueError, match=reason):
        write_state(path, state)
    assert read_state(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_midway_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    write_state(path, {"a": 1})

    def disk_full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_state(path, {"a": 2})
    assert read_state(path) == {"a": 1}


@pytest.mark.parametrize("content", [b"PK\x03\x04\xff", b"[1]", b'{"a": '])
def test_another_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt is not a state file of slime"):
        read_state(tmp_path / "state.pt")


def test_the_file_is_plain_json(tmp_path):
    write_state(tmp_path / "state.pt", {"a": 1})
    assert json.loads((tmp_path / "state.pt").read_text()) == {"a": 1}
