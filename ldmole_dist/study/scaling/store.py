"""The folder of a scaling study: machine.json, cells.csv with a row per cell, and latency.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_write, read_lines, write_errors
from ldmole_dist.selftest.local_ranks import RankFailed
from ldmole_dist.study.bench.latency import Latency
from ldmole_dist.study.folder import StudyFolder
from ldmole_dist.study.machine import machine
from ldmole_dist.study.scaling.cells import AXES, Cell
from ldmole_dist.study.scaling.code import code
from ldmole_dist.study.scaling.measure import WARMUP, Measured

_DONE = "ok"
_RESULTS = tuple(field.name for field in fields(Measured))
COLUMNS = (*AXES, "status", *_RESULTS)


@dataclass(frozen=True)
class Row:
    """A row of cells.csv.

    Args:
        cell: configuration.
        status: "ok", or the error if the cell failed.
        measured: results; None if the cell failed.
    """

    cell: Cell
    status: str
    measured: Measured | None


def done(cell: Cell, measured: Measured) -> Row:
    """Return the row of a successfully measured cell."""
    return Row(cell, _DONE, measured)


def failed(cell: Cell, error: Exception) -> Row:
    """Return the row of a cell that failed."""
    return Row(cell, reason(error), None)


def reason(error: Exception) -> str:
    """Return the last line of an error's message, or of the traceback in a `RankFailed`, cut to 300 characters."""
    text = str(error) if isinstance(error, RankFailed) else f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "failed"


def environment(steps: int) -> dict[str, str]:
    """Return what the results depend on besides the cell: machine, library versions, code and numbers of steps.

    Args:
        steps: number of timed steps.
    """
    return machine() | {"code": code(), "warmup_steps": str(WARMUP), "timed_steps": str(steps)}


class Store(StudyFolder):
    """The folder of a scaling study.

    Args:
        folder: path of the folder.
        machine: result of `environment`; None opens an existing folder for reading.

    Raises:
        UserError: if the folder cannot be used (see `StudyFolder`), or another version wrote other columns to
            cells.csv.
    """

    def __init__(self, folder: Path, machine: Mapping[str, str] | None) -> None:
        super().__init__(folder, machine, "machine.json", "cells.csv")
        self.latency = folder / "latency.json"
        header, stored = ",".join(COLUMNS), next(read_lines(self.table), None)
        if stored is not None and stored.decode() != header + "\n":
            differing = ", ".join(sorted({*stored.decode().strip().split(",")} ^ {*COLUMNS})) or "another order"
            raise UserError(
                f"{self.table} does not have the columns of this version of ldmole_dist (different: {differing}); "
                "choose another --output"
            )
        if stored is None and machine is not None:
            self.append(header)

    def rows(self) -> list[Row]:
        """Return all rows in the order in which they were measured.

        Raises:
            UserError: if a line cannot be read.
        """
        return self.parsed(_parse, first=1)

    def add(self, row: Row) -> None:
        """Append a row and sync it to disk.

        Raises:
            UserError: if the row cannot be written.
        """
        measured = dict.fromkeys(_RESULTS, "") if row.measured is None else asdict(row.measured)
        values = {**asdict(row.cell), "status": row.status, **measured}
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(
            json.dumps(value) if isinstance(value, (dict, list)) else value for value in values.values()
        )
        self.append(line.getvalue())

    def latencies(self) -> list[Latency] | str | None:
        """Return the stored results of `bench_latency`.

        Returns:
            The results; a string with the error if the benchmark failed; None if it has not run.

        Raises:
            UserError: if latency.json cannot be read.
        """
        if not self.latency.is_file():
            return None
        try:
            stored = json.loads(self.latency.read_text())
            return stored["failed"] if isinstance(stored, dict) else [Latency(**values) for values in stored]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.latency} cannot be read ({error}); delete it to measure it again") from error

    def add_latencies(self, latencies: list[Latency] | str) -> None:
        """Write latency.json.

        Args:
            latencies: results of `bench_latency`, or the error if it failed.

        Raises:
            UserError: if the file cannot be written.
        """
        value = {"failed": latencies} if isinstance(latencies, str) else [each._asdict() for each in latencies]
        with write_errors(str(self.latency)):
            atomic_write(self.latency, json.dumps(value, indent=2) + "\n")


def _parse(line: str) -> Row:
    row = dict(zip(COLUMNS, next(csv.reader([line])), strict=True))
    cell = Cell(**{name: int(row[name]) if row[name].lstrip("-").isdigit() else row[name] for name in AXES})  # type: ignore[arg-type]
    if row["status"] != _DONE:
        return Row(cell, row["status"], None)
    return Row(cell, _DONE, Measured(**{name: json.loads(row[name]) for name in _RESULTS}))
