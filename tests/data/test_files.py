import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.data.files import read_rows, split_slice

NUM_ROWS = 7
bounds = st.none() | st.integers(-10, 10)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"n": n}) for n in range(NUM_ROWS)]
    path.write_text("\n\n".join(lines) + "\n")  # a blank line after every row
    return str(path)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(NUM_ROWS))}), path, row_group_size=3)
    return str(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "saved"
    data = datasets.Dataset.from_list([{"n": n} for n in [*reversed(range(NUM_ROWS)), 99]])
    data.sort("n").select(range(NUM_ROWS)).save_to_disk(str(folder), num_shards=2)  # an order of its own, and a part
    return str(folder)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@given(start=bounds, stop=bounds)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_slice_of_a_file_is_the_python_slice_of_its_rows(request, kind, start, stop):
    path = request.getfixturevalue(kind)
    text = f"{path}@[{'' if start is None else start}:{'' if stop is None else stop}]"
    assert [row.values["n"] for row in read_rows(text)] == list(range(NUM_ROWS))[start:stop]


def test_a_row_knows_its_line_or_row_number(jsonl, parquet):
    assert [row.location for row in read_rows(f"{jsonl}@[1:3]")] == [f"{jsonl}:3", f"{jsonl}:5"]
    assert [row.location for row in read_rows(f"{parquet}@[3:5]")] == [f"{parquet} row 4", f"{parquet} row 5"]


def test_a_slice_of_a_parquet_file_may_span_several_batches(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(5000))}), path, row_group_size=1000)
    rows = list(read_rows(f"{path}@[500:4500]"))
    assert [row.values["n"] for row in rows] == list(range(500, 4500))
    assert rows[-1].location == f"{path} row 4500"


def test_rows_before_the_slice_are_not_parsed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('broken\n{"n": 1}\nbroken\n')
    assert [row.values for row in read_rows(f"{path}@[1:2]")] == [{"n": 1}]


@pytest.mark.parametrize("slice_text", ["[1]", "[a:b]", "[1:2:3]", "[]", "[1.5:]"])
def test_a_malformed_slice_is_refused(slice_text):
    with pytest.raises(ValueError, match=r"must be \[start:stop\]"):
        split_slice(f"rows.jsonl@{slice_text}")


def test_a_path_may_contain_an_at_sign():
    assert split_slice("user@host/rows.jsonl") == ("user@host/rows.jsonl", slice(None))
    assert split_slice("a@[x/rows.jsonl@[:2]") == ("a@[x/rows.jsonl", slice(None, 2))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"n": 1', "not valid JSON .* at column 8"),
        (b"[1, 2]", "must be a JSON object with keys, got a list"),
        (b'{"n": "\xff"}', "not valid UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 0}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {reason}"):
        list(read_rows(str(path)))


def test_a_missing_file_a_folder_and_another_kind_of_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl' does not exist"):
        read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="was not written by datasets' save_to_disk"):
        read_rows(str(tmp_path))
    (tmp_path / "rows.csv").write_text("n\n1\n")
    with pytest.raises(ValueError, match=r"must end in \.jsonl .* or \.parquet"):
        read_rows(str(tmp_path / "rows.csv"))


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "rows.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="is not a parquet file"):
        list(read_rows(str(tmp_path / "rows.parquet")))


def test_integers_of_any_size_are_read_exactly(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 123456789012345678901234567890}\n')
    assert next(iter(read_rows(str(path)))).values["n"] == 123456789012345678901234567890


def test_a_folder_of_several_splits_is_refused_with_their_names(tmp_path):
    split = datasets.Dataset.from_dict({"n": [1, 2]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match="holds the splits train, test: name one"):
        read_rows(str(tmp_path / "both"))
    assert [row.location for row in read_rows(str(tmp_path / "both" / "test"))][-1].endswith("both/test row 2")


def test_a_damaged_folder_is_refused(tmp_path):
    datasets.Dataset.from_dict({"n": [1]}).save_to_disk(str(tmp_path / "saved"))
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    shard.write_bytes(b"not arrow")
    with pytest.raises(ValueError, match="saved' is damaged"):
        read_rows(str(tmp_path / "saved"))
