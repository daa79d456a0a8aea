"""Rows of JSON-lines files that stay on disk.

All rows are read and checked once at the start; only the position of every `STRIDE`-th row stays in memory. Each rank checks
one part of every file (all parts have about the same size), and `StreamedRows` combines the indexes of the parts.
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

STRIDE = 32  # a larger value saves memory, but to read a row, about STRIDE / 2 rows before it are read too


@dataclass(frozen=True)
class PartIndex:
    """Index of the lines that start in one part (byte range) of a file.

    Args:
        rows: number of rows, which are the lines that are not blank.
        lines: number of lines, including blank ones.
        marks: (marks, 2) array: byte offset in the file and line number in the part (from 0) of every `STRIDE`-th row.
        digest: sum of the 64-bit hashes of the rows, modulo 2**64; independent of the order of the rows.
    """

    rows: int
    lines: int
    marks: NDArray[np.int64]
    digest: int


def index_part(
    source: Source, parser: RowParser, check: Callable[[Row], None], part: int, parts: int, quiet: bool
) -> PartIndex:
    """Read, check and index the rows in one of `parts` equal parts of a file.

    Args:
        source: .jsonl source from the config.
        parser: parser of the source's records.
        check: function that raises a UserError if a row cannot be encoded.
        part: index of the part, from 0.
        parts: number of parts.
        quiet: hide the progress bar.

    Raises:
        UserError: if the file cannot be read or has no rows, or if a row is invalid; the message names the file and, for an
            invalid row, its line.
    """
    assert source.path is not None  # the config requires a path for streaming
    path = Path(source.path)
    try:
        size = path.stat().st_size
        first, end = size * part // parts, size * (part + 1) // parts
        with path.open("rb") as file:
            _parse_first_row(file, path, parser)
            # A line that starts before `first` belongs to an earlier part.
            file.seek(max(0, first - 1))
            offset = first if first == 0 else first - 1 + len(file.readline())
            return _index(
                file, path, lambda line, where: check(parser(parse_line(line, where), where)), offset, end, quiet
            )
    except OSError as error:
        raise UserError(
            f"cannot read data file {path}: {error.strerror or error}; check the path and its permissions."
        ) from error


def _parse_first_row(file: BinaryIO, path: Path, parser: RowParser) -> None:
    """Parse the first row of the file, which determines the format for all parts.

    Raises:
        UserError: if the file has no rows, or the first row is invalid.
    """
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            parser(parse_line(line, where), where)
            return
    raise UserError(f"data source {path} has no rows; add rows to it, or use another source.")


def _index(
    file: BinaryIO, path: Path, check: Callable[[bytes, str], None], offset: int, end: int, quiet: bool
) -> PartIndex:
    """Check and index the lines from byte `offset` (the start of a line) up to the last one that starts before byte `end`.

    Args:
        file: the file, opened for reading.
        path: path of the file.
        check: function that takes a line and its location, and raises a UserError if the row is invalid.
        offset: start of the first line, in bytes.
        end: end of the part, in bytes.
        quiet: hide the progress bar.
    """
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
        parts: indexes of all parts of the file, in order.
    """

    def __init__(self, path: str, parts: Sequence[PartIndex]) -> None:
        self.path, self.parts = path, parts
        self._first_rows = list(accumulate((part.rows for part in parts), initial=0))
        self._first_lines = list(accumulate((part.lines for part in parts), initial=0))
        self._file: tuple[int, BinaryIO] | None = None

    def __len__(self) -> int:
        return self._first_rows[-1]

    def line(self, row: int) -> tuple[bytes, str]:
        """Return the line of a row (from 0) and its location, "FILE, line N".

        Raises:
            UserError: if the file cannot be opened, or is shorter than when it was checked.
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
        raise UserError(
            f"data file {self.path} became shorter during the run; restore it and run the same command again."
        )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None}  # open files cannot be pickled

    def _open(self) -> BinaryIO:
        """Return the file, opened by this process.

        A forked worker opens the file again, because an inherited file object shares its position with the parent process.

        Raises:
            UserError: if the file cannot be opened.
        """
        if self._file is None or self._file[0] != os.getpid():
            try:
                self._file = (os.getpid(), Path(self.path).open("rb"))  # noqa: SIM115  (stays open for the run)
            except OSError as error:
                raise UserError(
                    f"cannot read data file {self.path}: {error.strerror or error}; restore the file."
                ) from error
        return self._file[1]


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline():
        yield line


class StreamedRows:
    """Rows of several files, concatenated.

    Args:
        sources: sources from the config.
        parsers: parser of each source.
        parts: for each source, the indexes of its parts, in order.

    Attributes:
        digest: hash of all rows, independent of their order within a file.
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
            UserError: if the file cannot be read, or the row has become invalid since it was checked; the message names the
                file, and the line if there is one.
        """
        file, line, where = self._line(index)
        return self.parsers[file](parse_line(line, where), where)

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each file."""
        return [len(file) for file in self.files]

    @property
    def lengths(self) -> Sequence[int]:
        """Length of each row's line in bytes, as an estimate of its number of tokens; each access reads the line."""
        return _Lengths(self)

    def _line(self, index: int) -> tuple[int, bytes, str]:
        file = bisect_right(self._first_rows, index) - 1
        return file, *self.files[file].line(index - self._first_rows[file])


class _Lengths(Sequence[int]):  # not a closure, because workers may receive it pickled
    def __init__(self, rows: StreamedRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        return len(self._rows._line(index)[1])
