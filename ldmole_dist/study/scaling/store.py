"""The study's folder: what it was measured on, and one CSV row a cell, on the disk as soon as the cell is done.

One folder is one machine, one set of versions, one state of the code and one number of steps: figures of two would be
compared as if they were of one. An interrupted study goes on where it stopped. To have a cell measured again, delete its line.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ldmole_dist.errors import UserError
from ldmole_dist.io import append_lines, atomic_write, read_lines, write_errors
from ldmole_dist.selftest.local_ranks import RankFailed
from ldmole_dist.study.bench.latency import Latency
from ldmole_dist.study.machine import machine
from ldmole_dist.study.scaling.cells import AXES, Cell
from ldmole_dist.study.scaling.code import code
from ldmole_dist.study.scaling.measure import WARMUP, Measured

_DONE = "ok"
_RESULTS = tuple(field.name for field in fields(Measured))
COLUMNS = (*AXES, "status", *_RESULTS)


@dataclass(frozen=True)
class Row:
    """A cell and what became of it: `measured` is None where it failed, and `status` says why."""

    cell: Cell
    status: str
    measured: Measured | None


def done(cell: Cell, measured: Measured) -> Row:
    """The row of a cell that was measured."""
    return Row(cell, _DONE, measured)


def failed(cell: Cell, error: Exception) -> Row:
    """The row of a cell that was not."""
    return Row(cell, reason(error), None)


def reason(error: Exception) -> str:
    """Of a failure, in a line: a rank's own error is the last line of its traceback."""
    text = str(error) if isinstance(error, RankFailed) else f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "failed"


def environment(steps: int) -> dict[str, str]:
    """What the figures depend on beside the settings of a cell.

    Args:
        steps: that are timed.
    """
    return machine() | {"code": code(), "warmup_steps": str(WARMUP), "timed_steps": str(steps)}


class Store:
    """See the head of this file.

    Args:
        folder: of the study; made if need be.
        machine: as `environment` says it; None only reads, whatever machine that was.

    Raises:
        UserError: where the folder cannot be written or read, or holds a study of something else.
    """

    def __init__(self, folder: Path, machine: dict[str, str] | None) -> None:
        self.folder = folder
        self.table, self.latency, about = folder / "cells.csv", folder / "latency.json", folder / "machine.json"
        if machine is None and not about.is_file():
            raise UserError(
                f"{folder} holds no study: run one first, without --page-only, or give its folder as --output"
            )
        try:
            if not about.is_file():
                if self.table.exists():
                    raise UserError(f"{folder} holds {self.table.name} but not {about.name}: choose another --output")
                folder.mkdir(parents=True, exist_ok=True)
                atomic_write(about, json.dumps(machine, indent=2) + "\n")
            self.machine: dict[str, str] = json.loads(about.read_text())
        except OSError as error:
            raise UserError(
                f"--output {folder}: {error.strerror} ({error.filename}); choose a folder that can be written"
            ) from error
        except ValueError as error:
            raise UserError(f"{about} is damaged ({error}): choose another --output") from error
        if not isinstance(self.machine, dict) or "timed_steps" not in self.machine:
            raise UserError(
                f"{about} was written by another version of this study: choose another --output, or remove {folder}"
            )
        if machine is not None and (differing := [k for k in machine if machine[k] != self.machine.get(k)]):
            was = ", ".join(f"{k} {self.machine.get(k)}, here {machine[k]}" for k in differing)
            asked = f"give --steps {self.machine.get('timed_steps')}, " if differing == ["timed_steps"] else ""
            raise UserError(
                f"{folder} holds a study of something else ({was}): {asked}choose another --output, or --page-only for its page"
            )
        self._begin(writes=machine is not None)

    def _begin(self, writes: bool) -> None:
        heading = next(read_lines(self.table), None)
        if heading is not None and heading.decode() != ",".join(COLUMNS) + "\n":
            raise UserError(
                f"{self.table} was written by another version of this study: choose another --output, or remove it"
            )
        if writes and heading is None:
            with write_errors(str(self.table)):
                append_lines(self.table, [",".join(COLUMNS)])

    def rows(self) -> list[Row]:
        """All whole rows, in the order in which they were measured.

        Raises:
            UserError: naming a line that cannot be read.
        """
        whole = (line.decode(errors="replace") for line in read_lines(self.table))
        rows = []
        for number, values in enumerate(csv.reader(whole), start=1):
            if number == 1:
                continue
            try:
                rows.append(_parsed(values))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{self.table}, line {number} cannot be read ({error}): delete that line") from error
        return rows

    def add(self, row: Row) -> None:
        """Append a row; it is on the disk when this returns.

        Raises:
            UserError: where it cannot be written; those before it are kept.
        """
        measured = dict.fromkeys(_RESULTS, "") if row.measured is None else asdict(row.measured)
        values = {**asdict(row.cell), "status": row.status, **measured}
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(
            json.dumps(value) if isinstance(value, (dict, list)) else value for value in values.values()
        )
        with write_errors(str(self.table)):
            append_lines(self.table, [line.getvalue()])

    def latencies(self) -> list[Latency] | str | None:
        """What `bench_latency` measured for this study, why it failed, or None if it has not run."""
        if not self.latency.is_file():
            return None
        try:
            kept = json.loads(self.latency.read_text())
            return kept["failed"] if isinstance(kept, dict) else [Latency(**values) for values in kept]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.latency} cannot be read ({error}): delete it") from error

    def add_latencies(self, latencies: list[Latency] | str) -> None:
        """Keep them, or why there are none; the file appears whole or not at all.

        Raises:
            UserError: where it cannot be written.
        """
        kept = {"failed": latencies} if isinstance(latencies, str) else [each._asdict() for each in latencies]
        with write_errors(str(self.latency)):
            atomic_write(self.latency, json.dumps(kept, indent=2) + "\n")


def _parsed(values: list[str]) -> Row:
    row = dict(zip(COLUMNS, values, strict=True))
    cell = Cell(**{name: _value(row[name]) for name in AXES})
    if row["status"] != _DONE:
        return Row(cell, row["status"], None)
    return Row(cell, _DONE, Measured(**{name: json.loads(row[name]) for name in _RESULTS}))


def _value(text: str) -> Any:
    return int(text) if text.lstrip("-").isdigit() else text
