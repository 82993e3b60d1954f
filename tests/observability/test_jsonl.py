import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from slime.observability.jsonl import JsonlWriter, read_jsonl


def test_each_line_is_on_disk_when_append_returns(tmp_path: Path):
    writer = JsonlWriter(tmp_path / "new" / "a.jsonl")
    writer.append({"step": 1})
    assert (tmp_path / "new" / "a.jsonl").read_text() == '{"step": 1}\n'
    writer.close()


def test_nan_and_infinities_are_valid_json_and_read_back(tmp_path: Path):
    writer = JsonlWriter(tmp_path / "a.jsonl")
    writer.append({"values": {"a": math.nan, "b": [math.inf, -math.inf, 1.5]}})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads((tmp_path / "a.jsonl").read_text(), parse_constant=refuse)
    assert math.isnan(float(record["values"]["a"]))
    assert [float(value) for value in record["values"]["b"]] == [math.inf, -math.inf, 1.5]


@pytest.mark.parametrize("length", [5, 70_000, 200_000])
def test_a_torn_last_line_is_ignored_and_cut_off_by_the_next_writer(tmp_path: Path, length: int):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"x": "' + "y" * length)
    assert read_jsonl(path) == [{"step": 1}]
    writer = JsonlWriter(path)
    writer.append({"step": 2})
    writer.close()
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_file_that_is_one_torn_line_starts_anew(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step')
    JsonlWriter(path).close()
    assert path.read_bytes() == b""


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        read_jsonl(path)


def test_several_processes_append_whole_lines_to_one_file(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from slime.observability.jsonl import JsonlWriter\n"
        "writer = JsonlWriter(Path(sys.argv[1]))\n"
        "for i in range(300): writer.append({'who': sys.argv[2], 'i': i, 'pad': 'x' * 500})\n"
    )
    path = tmp_path / "a.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), who]) for who in "ab"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    records = read_jsonl(path)
    for who in "ab":
        assert [record["i"] for record in records if record["who"] == who] == list(range(300))


def test_a_process_that_opens_a_file_loses_no_line_that_another_is_writing(tmp_path: Path):
    write = "JsonlWriter(path).append({'i': i, 'pad': 'x' * 50_000})"
    code = (
        "import sys; from pathlib import Path; from slime.observability.jsonl import JsonlWriter\n"
        f"path = Path(sys.argv[1])\nfor i in range(300): {write}\n"
    )
    path = tmp_path / "a.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert sorted(record["i"] for record in read_jsonl(path)) == sorted([*range(300)] * 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path):
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    writer = JsonlWriter(tmp_path / "a.jsonl")
    with pytest.raises(OSError, match=r"cannot write a line.*a\.jsonl"):
        writer.append({"step": 1})
    writer.close()
