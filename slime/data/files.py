"""Rows of prompt files, with Python slices: `train.parquet@[:1000]`, `math.jsonl@[-200:]`, `saved_dataset/train@[:10]`.

Read are jsonl, parquet, and the folders that `datasets.Dataset.save_to_disk` writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow

_SLICED_PATH = re.compile(r"(?P<path>.+)@\[(?P<bounds>.*)\]")
_BOUNDS = re.compile(r"(-?\d+)?:(-?\d+)?")


class Row(NamedTuple):
    """One record and where it stands, such as `train.jsonl:17`, for error messages."""

    location: str
    values: dict[str, Any]


def split_slice(path: str) -> tuple[str, slice]:
    """The file path and the rows wanted of `file` or `file@[start:stop]`, bounds as in Python."""
    match = _SLICED_PATH.fullmatch(path)
    if match is None:
        return path, slice(None)
    bounds = _BOUNDS.fullmatch(match["bounds"].replace(" ", ""))
    if bounds is None:
        raise ValueError(f"data file {path!r}: the slice must be [start:stop], each a whole number or left out")
    start, stop = (None if bound is None else int(bound) for bound in bounds.groups())
    return match["path"], slice(start, stop)


def read_rows(path: str) -> Iterator[Row]:
    """The rows of `path` or `path@[start:stop]` in file order, read as they are asked for.

    Blank lines of a jsonl file are no rows. Raises ValueError where the file is missing, of another kind, or a row
    in the slice is not a JSON object; the message names file and line.
    """
    file_path, rows = split_slice(path)
    if Path(file_path).is_dir():
        return _rows_of_table(file_path, _saved_table(Path(file_path)), rows)
    if not Path(file_path).is_file():
        raise ValueError(f"data file {file_path!r} does not exist")
    match Path(file_path).suffix:
        case ".jsonl":
            return _read_jsonl(file_path, rows)
        case ".parquet":
            return _read_parquet(file_path, rows)
        case _:
            raise ValueError(
                f"data file {file_path!r} must end in .jsonl (one JSON object a line) or .parquet, "
                "or be a folder of datasets' save_to_disk"
            )


def _read_jsonl(path: str, rows: slice) -> Iterator[Row]:
    with open(path, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if not line.isspace())
        for number, line in _take(lines, rows):
            location = f"{path}:{number}"
            yield Row(location, _parse_object(line, location))


def _take(lines: Iterable[tuple[int, bytes]], rows: slice) -> Iterable[tuple[int, bytes]]:
    """`lines[rows]`; only a negative bound needs the whole file in memory."""
    if (rows.start or 0) < 0 or (rows.stop or 0) < 0:
        return list(lines)[rows]
    return islice(lines, rows.start, rows.stop)


def _parse_object(line: bytes, location: str) -> dict[str, Any]:
    try:
        values = json.loads(line.rstrip())  # with its newline, an error at the end would be at column 1
    except json.JSONDecodeError as error:
        raise ValueError(f"{location}: not valid JSON ({error.msg} at column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{location}: not valid UTF-8 ({error.reason} at byte {error.start})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{location}: must be a JSON object with keys, got a {type(values).__name__}")
    return values


def _read_parquet(path: str, rows: slice) -> Iterator[Row]:
    import pyarrow  # 0.1 s to import: only for those who read parquet
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data file {path!r} is not a parquet file ({error})") from error
    with file:
        start, stop, _ = rows.indices(file.metadata.num_rows)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            first, last = max(start - number, 0), min(stop - number, batch.num_rows)
            if first < last:
                for offset, values in enumerate(batch.slice(first, last - first).to_pylist(), start=number + first):
                    yield Row(f"{path} row {offset + 1}", values)
            number += batch.num_rows
            if number >= stop:
                return


def _saved_table(folder: Path) -> pyarrow.Table:
    """The data set that `datasets` saved in `folder`, mapped into memory. Raises ValueError if it is not one split."""
    import pyarrow

    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"data folder {str(folder)!r} holds the splits {', '.join(splits)}: name one, {folder}/SPLIT")
    if not (folder / "state.json").is_file():
        raise ValueError(f"data folder {str(folder)!r} was not written by datasets' save_to_disk: name a file in it")
    names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    try:
        return pyarrow.concat_tables(
            pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / name))).read_all() for name in names
        )
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"data folder {str(folder)!r} is damaged ({error})") from error


def _rows_of_table(path: str, table: pyarrow.Table, rows: slice) -> Iterator[Row]:
    start, stop, _ = rows.indices(table.num_rows)
    number = start
    for batch in table.slice(start, max(0, stop - start)).to_batches(max_chunksize=1024):
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{path} row {number}", values)
