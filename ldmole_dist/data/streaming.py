"""Rows of JSON-lines files that stay on the disk: all are read and checked once; what is kept is where some of them begin.

The ranks share the reading: each looks at a part of the bytes of every file, and `StreamedRows` puts the parts together.
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
from ldmole_dist.data.records import located_line, parse_line
from ldmole_dist.data.rows import Row
from ldmole_dist.data.sources import RowMaker
from ldmole_dist.errors import UserError

STRIDE = 32  # rows from one whose place is known to the next; finding a row reads half of that


@dataclass(frozen=True)
class Part:
    """What is known of the lines that begin in a part of a file's bytes.

    Args:
        rows: lines that are not blank.
        lines: all of them.
        marks: (M, 2), the offset and the line, from 0 within the part, of every `STRIDE`-th row.
        digest: of the rows, whatever their order.
    """

    rows: int
    lines: int
    marks: NDArray[np.int64]
    digest: int


def read_part(
    source: Source, maker: RowMaker, check: Callable[[Row], None], part: int, parts: int, quiet: bool
) -> Part:
    """Read and check the rows of one of equal parts of a file.

    Args:
        source: a .jsonl file.
        maker: of rows.
        check: raises where a row cannot be encoded.
        part: which, from 0.
        parts: how many there are.
        quiet: no progress bar.

    Raises:
        UserError: naming file and line, where a row is not as it should be; naming the file, where it cannot be read.
    """
    assert source.path is not None  # the config's check says so
    path = Path(source.path)
    try:
        size = path.stat().st_size
        first, end = size * part // parts, size * (part + 1) // parts
        with path.open("rb") as file:
            _recognise(file, path, maker)
            # A line that began before belongs to the part before.
            file.seek(max(0, first - 1))
            offset = first if first == 0 else first - 1 + len(file.readline())
            return _read(
                file, path, lambda line, where: check(maker(parse_line(line, where), where)), offset, end, quiet
            )
    except OSError as error:
        raise UserError(f"data file {path}: {error.strerror or error}; check data.train") from error


def _recognise(file: BinaryIO, path: Path, maker: RowMaker) -> None:
    """Let the file's first row tell the format, as it does where one process reads all."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            maker(parse_line(line, where), where)
            return
    raise UserError(f"data file {path} holds no rows")


def _read(file: BinaryIO, path: Path, check: Callable[[bytes, str], None], offset: int, end: int, quiet: bool) -> Part:
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
                except UserError:  # said again with the place, which takes counting the lines before
                    check(line, located_line(path, offset))
                    raise
                if rows % STRIDE == 0:
                    marks.extend((offset, lines))
                rows += 1
                digest += int.from_bytes(hashlib.blake2b(line.strip(), digest_size=8).digest())
            lines += 1
            offset += len(line)
            bar.update(len(line))
    return Part(rows, lines, np.array(marks, dtype=np.int64).reshape(-1, 2), digest % 2**64)


class LineFile:
    """A file by its rows.

    Args:
        path: of the file.
        parts: of all of it, in order.
    """

    def __init__(self, path: str, parts: Sequence[Part]) -> None:
        self.path, self.parts = path, parts
        self._first_rows = list(accumulate((part.rows for part in parts), initial=0))
        self._first_lines = list(accumulate((part.lines for part in parts), initial=0))
        self._file: tuple[int, BinaryIO] | None = None

    def __len__(self) -> int:
        return self._first_rows[-1]

    def line(self, row: int) -> tuple[bytes, str]:
        """A row as it stands in the file, and where.

        Raises:
            UserError: where the file has changed since it was checked.
        """
        part = bisect_right(self._first_rows, row) - 1
        mark, skipped = divmod(row - self._first_rows[part], STRIDE)
        offset, number = map(int, self.parts[part].marks[mark])
        number += self._first_lines[part]
        file = self._opened()
        file.seek(offset)
        for line in _lines(file):
            number += 1
            if line.strip():
                if skipped == 0:
                    return line, f"{self.path}, line {number}"
                skipped -= 1
        raise UserError(f"data file {self.path} has become shorter while it was read: start again")

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None}

    def _opened(self) -> BinaryIO:
        """The file, opened by this process: a position that others share would move."""
        if self._file is None or self._file[0] != os.getpid():
            try:
                self._file = (os.getpid(), Path(self.path).open("rb"))  # noqa: SIM115  (stays open for the run)
            except OSError as error:
                raise UserError(f"data file {self.path}: {error.strerror or error}") from error
        return self._file[1]


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline():
        yield line


class StreamedRows:
    """Rows of several files, one after the other.

    Args:
        sources: of the config.
        makers: of each.
        parts: of each, of all ranks, in order.
    """

    def __init__(self, sources: Sequence[Source], makers: Sequence[RowMaker], parts: Sequence[Sequence[Part]]) -> None:
        self.makers = makers
        self.files = [LineFile(str(source.path), of_file) for source, of_file in zip(sources, parts, strict=True)]
        self._firsts = list(accumulate(map(len, self.files), initial=0))
        digest = hashlib.sha256(repr([sum(part.digest for part in of_file) % 2**64 for of_file in parts]).encode())
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._firsts[-1]

    def row(self, index: int) -> Row:
        """Read one.

        Raises:
            UserError: naming file and line, where it has changed since it was checked.
        """
        file, line, where = self._line(index)
        return self.makers[file](parse_line(line, where), where)

    @property
    def sizes(self) -> list[int]:
        """Rows of each file."""
        return [len(file) for file in self.files]

    @property
    def lengths(self) -> Sequence[int]:
        """Bytes of each row, read when asked for: what is about the number of its tokens."""
        return _Lengths(len(self), lambda index: len(self._line(index)[1]))

    def _line(self, index: int) -> tuple[int, bytes, str]:
        file = bisect_right(self._firsts, index) - 1
        return file, *self.files[file].line(index - self._firsts[file])


class _Lengths(Sequence[int]):
    def __init__(self, size: int, length: Callable[[int], int]) -> None:
        self._size, self._length = size, length

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        return self._length(index)
