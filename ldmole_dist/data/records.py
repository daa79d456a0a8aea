"""Readers of data files, which yield each record with its location."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ldmole_dist.errors import UserError

LocatedRecord = tuple[dict[str, Any], str]


def read_records(path: str) -> Iterator[LocatedRecord]:
    """Yield the records of a file, each with its location: "FILE, line N", or "FILE, row N" for JSON arrays and Parquet.

    Args:
        path: path of a .parquet file, a .csv file with a header, or a file with one JSON object per line; a .json file may hold
            one array of objects instead.

    Raises:
        UserError: if the file cannot be read or a record is invalid; the message names the location.
    """
    file = Path(path)
    try:
        yield from _reader(file)(file)
    except OSError as error:
        raise UserError(
            f"cannot read data file {path}: {error.strerror or error}; check the path and its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text ({error}); convert it to UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"data file {path} is not valid CSV ({error}); check its quotes and line breaks.") from error


def parse_line(line: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that a line holds.

    Raises:
        UserError: if the line is not a JSON object; the message names `where`.
    """
    try:
        return _check_object(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}; correct or delete the line."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error}); convert the file to UTF-8.") from error


def line_location(file: Path, offset: int) -> str:
    """Return "FILE, line N" for the line that starts at byte `offset`."""
    with file.open("rb") as content:
        remaining, number = offset, 1
        while remaining > 0:
            block = content.read(min(remaining, 1 << 20))
            number += block.count(b"\n")
            remaining -= len(block)
    return f"{file}, line {number}"


def _reader(file: Path) -> Callable[[Path], Iterator[LocatedRecord]]:
    if file.suffix == ".parquet":
        return _read_parquet
    if file.suffix == ".csv":
        return _read_csv
    if file.suffix == ".json" and _starts_with(file, "["):
        return _read_array
    return _read_lines


def _starts_with(file: Path, prefix: str) -> bool:
    with file.open(encoding="utf-8") as lines:
        return next((line.lstrip().startswith(prefix) for line in lines if line.strip()), False)


def _read_lines(file: Path) -> Iterator[LocatedRecord]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield parse_line(line, where), where


def _read_array(file: Path) -> Iterator[LocatedRecord]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"{file}, line {error.lineno}"
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}; correct the file.") from error
    for number, record in enumerate(records, start=1):
        where = f"{file}, row {number}"
        yield _check_object(record, where), where


def _read_csv(file: Path) -> Iterator[LocatedRecord]:
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        for record in reader:
            where = f"{file}, line {reader.line_num}"
            # DictReader collects extra fields under the key None and fills missing ones with None.
            if None in record or None in record.values():
                raise UserError(
                    f"{where}: the number of fields differs from that of the header {reader.fieldnames}; correct the row."
                )
            yield record, where


def _read_parquet(file: Path) -> Iterator[LocatedRecord]:
    import pyarrow.parquet  # deferred: it is slow to import, and most data files have other formats

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield record, f"{file}, row {number}"
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {file} is not valid Parquet ({error}); create the file again.") from error


def _check_object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {record!r:.60}; correct or delete the record.")
    return record
