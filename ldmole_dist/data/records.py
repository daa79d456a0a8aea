"""Reading files of records, each with the place that it stands in."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ldmole_dist.errors import UserError

Located = tuple[dict[str, Any], str]


def read_records(path: str) -> Iterator[Located]:
    """Records of a file and where each is from: "FILE, line N", or "FILE, row N" where there are no lines.

    Args:
        path: .jsonl or .json (an object a line; .json may also be one array), .csv with a header, or .parquet.

    Raises:
        UserError: naming file and line, where it cannot be read.
    """
    file = Path(path)
    try:
        yield from _reader(file)(file)
    except OSError as error:
        raise UserError(f"data file {path}: {error.strerror or error}; check data.train and data.eval") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text: {error}") from error
    except csv.Error as error:
        raise UserError(f"data file {path} is damaged: {error}") from error


def _reader(file: Path) -> Callable[[Path], Iterator[Located]]:
    if file.suffix == ".parquet":
        return _parquet
    if file.suffix == ".csv":
        return _csv
    if file.suffix == ".json" and _begins_with(file, "["):
        return _array
    return _lines


def _begins_with(file: Path, sign: str) -> bool:
    with file.open(encoding="utf-8") as lines:
        return next((line.lstrip().startswith(sign) for line in lines if line.strip()), False)


def _lines(file: Path) -> Iterator[Located]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield parse_line(line, where), where


def parse_line(line: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        UserError: naming `where`, if there is none.
    """
    try:
        return _object(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text: {error}") from error


def located_line(file: Path, offset: int) -> str:
    """ "FILE, line N" of the line that begins at a byte."""
    with file.open("rb") as content:
        before, number = offset, 1
        while before > 0:
            block = content.read(min(before, 1 << 20))
            number += block.count(b"\n")
            before -= len(block)
    return f"{file}, line {number}"


def _array(file: Path) -> Iterator[Located]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    for number, record in enumerate(records, start=1):
        where = f"{file}, row {number}"
        yield _object(record, where), where


def _csv(file: Path) -> Iterator[Located]:
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        for record in reader:
            where = f"{file}, line {reader.line_num}"
            if None in record or None in record.values():
                raise UserError(f"{where}: has another number of fields than the header, {reader.fieldnames}")
            yield record, where


def _parquet(file: Path) -> Iterator[Located]:
    import pyarrow.parquet  # which takes its time, and most files are others

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield record, f"{file}, row {number}"
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {file} is damaged: {error}") from error


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object, is {record!r:.60}")
    return record
