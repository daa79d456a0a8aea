"""Rows of JSON-lines files that stay on disk.

All rows are read and checked once at the start; only the byte offset of every `STRIDE`-th row stays in memory. Each rank checks
an equal part of the bytes of every file, and `StreamedRows` combines the indexes of the parts.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ldmole_dist.config import Source
from ldmole_dist.data.records import line_location, parse_line
from ldmole_dist.data.rows import Row
from ldmole_dist.data.sources import RowParser
from ldmole_dist.errors import UserError

STRIDE = 32  # trades memory for reads: finding a row reads 16 others on average


@dataclass(frozen=True)
class PartIndex:
    """Index of the lines that start in one part of a file's bytes.

    Args:
        rows: number of lines that are not blank.
        lines: number of all lines.
        marks: (M, 2) byte offset and line number (from 0 within the part) of every `STRIDE`-th row.
        digest: hash of the rows, independent of their order.
    """

    rows: int
    lines: int
    marks: NDArray[np.int64]
    digest: int


def index_part(
    source: Source, parser: RowParser, check: Callable[[Row], None], part: int, parts: int, quiet: bool
) -> PartIndex:
    """Read, check and index the rows in one of several equal parts of a file.

    Args:
        source: .jsonl source from the config.
        parser: parser of its rows.
        check: function that raises a UserError if a row cannot be encoded.
        part: index of the part, from 0.
        parts: number of parts.
        quiet: hide the progress bar.

    Raises:
        UserError: for an invalid row, naming file and line, or if the file cannot be read.
    """
    assert source.path is not None  # the config requires a path for streaming
    path = Path(source.path)
    try:
        size = path.stat().st_size
        first, end = size * part // parts, size * (part + 1) // parts
        with path.open("rb") as file:
            _parse_first_row(file, path, parser)
            # A line that starts before `first` belongs to the previous part.
            file.seek(max(0, first - 1))
            offset = first if first == 0 else first - 1 + len(file.readline())
            return _index(
                file, path, lambda line, where: check(parser(parse_line(line, where), where)), offset, end, quiet
            )
    except OSError as error:
        raise UserError(f"cannot read data file {path}: {error.strerror or error}; check data.train.") from error


def _parse_first_row(file: BinaryIO, path: Path, parser: RowParser) -> None:
    """Parse the first row of the file, which determines the format in every part."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            parser(parse_line(line, where), where)
            return
    raise UserError(f"data source {path} has no rows; check data.train.")


def _index(
    file: BinaryIO, path: Path, check: Callable[[bytes, str], None], offset: int, end: int, quiet: bool
) -> PartIndex:
    rows = lines = digest = 0
    marks = array("q")
    file.seek(offset)
    with tqdm(
        total=max(0, end - offset), desc=f"checking {path.name}", unit="B", unit_scale=True, disable=quiet
    ) as bar:
        while offset < end and (line := file.readline()):
            if line.strip():
                try:
                    check(line, "")
                except UserError:
                    # Only an error needs the line number, and finding it reads the file from the start.
                    check(line, line_location(path, offset))
                    raise
                if rows % STRIDE == 0:
                    marks.extend((offset, lines))
                rows += 1
                digest += int.from_bytes(hashlib.blake2b(line.strip(), digest_size=8).digest())
            lines += 1
            offset += len(line)
            bar.update(len(line))
    return PartIndex(rows, lines, np.array(marks, dtype=np.int64).reshape(-1, 2), digest % 2**64)


class LineFile:
    """Random access to the rows of a file.

    Args:
        path: path of the file.
        parts: indexes of all its parts, in order.
    """

    def __init__(self, path: str, parts: Sequence[PartIndex]) -> None:
        self.path, self.parts = path, parts
        self._first_rows = list(accumulate((part.rows for part in parts), initial=0))
        self._first_lines = list(accumulate((part.lines for part in parts), initial=0))
        self._file: tuple[int, BinaryIO] | None = None

    def __len__(self) -> int:
        return self._first_rows[-1]

    def line(self, row: int) -> tuple[bytes, str]:
        """Return the line of a row (from 0), and its location.

        Raises:
            UserError: if the file has become shorter since it was checked.
        """
        part = bisect_right(self._first_rows, row) - 1
        mark, skipped = divmod(row - self._first_rows[part], STRIDE)
        offset, number = map(int, self.parts[part].marks[mark])
        number += self._first_lines[part]
        file = self._open()
        file.seek(offset)
        for line in _lines(file):
            number += 1
            if line.strip():
                if skipped == 0:
                    return line, f"{self.path}, line {number}"
                skipped -= 1
        raise UserError(f"data file {self.path} became shorter during the run; start the run again.")

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None}  # open files cannot be pickled

    def _open(self) -> BinaryIO:
        """Return a file object of this process: forked workers would share, and move, the position of an inherited one."""
        if self._file is None or self._file[0] != os.getpid():
            try:
                self._file = (os.getpid(), Path(self.path).open("rb"))  # noqa: SIM115  (stays open for the run)
            except OSError as error:
                raise UserError(f"cannot read data file {self.path}: {error.strerror or error}.") from error
        return self._file[1]


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline():
        yield line


class StreamedRows:
    """Rows of several files, concatenated.

    Args:
        sources: sources from the config.
        parsers: parser of each source.
        parts: indexes of all parts of each source, in the order of the ranks.
    """

    def __init__(
        self, sources: Sequence[Source], parsers: Sequence[RowParser], parts: Sequence[Sequence[PartIndex]]
    ) -> None:
        self.parsers = parsers
        self.files = [LineFile(str(source.path), of_file) for source, of_file in zip(sources, parts, strict=True)]
        self._first_rows = list(accumulate(map(len, self.files), initial=0))
        digest = hashlib.sha256(repr([sum(part.digest for part in of_file) % 2**64 for of_file in parts]).encode())
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._first_rows[-1]

    def row(self, index: int) -> Row:
        """Read and parse one row.

        Raises:
            UserError: if the row has changed since it was checked and is invalid; the message names file and line.
        """
        file, line, where = self._line(index)
        return self.parsers[file](parse_line(line, where), where)

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each file."""
        return [len(file) for file in self.files]

    @property
    def lengths(self) -> Sequence[int]:
        """Length of each row in bytes, read on access; an estimate of its number of tokens."""
        return _Lengths(len(self), lambda index: len(self._line(index)[1]))

    def _line(self, index: int) -> tuple[int, bytes, str]:
        file = bisect_right(self._first_rows, index) - 1
        return file, *self.files[file].line(index - self._first_rows[file])


class _Lengths(Sequence[int]):
    def __init__(self, size: int, length: Callable[[int], int]) -> None:
        self._size, self._length = size, length

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        return self._length(index)
