"""The comparison's folder: what it depends on, and one JSON line a finished run, on the disk as soon as the run is done.

One folder is one machine, one state of the code, one set of data and one budget: runs of two would be compared as if they were
of one. To have a run done again, delete its line and its folder.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ldmole_dist.errors import UserError
from ldmole_dist.io import append_jsonl, atomic_write, read_jsonl, write_errors

ABOUT, CELLS = "about.json", "cells.jsonl"


@dataclass(frozen=True)
class Row:
    """A finished run.

    Args:
        method: name in `methods.METHODS`.
        seed: of initial values, dropout and data order.
        after: what the evaluation after training said.
        before: the one before training, where there was one; the same for all runs.
        experts_per_token: active ones, mean over linears and tokens of the last quarter of the steps.
        parameters: of the adapter.
        tokens_per_second: median over the steps.
        peak_memory_gb: of the process (on a GPU: of the device), from the detailed reports; None where there was none.
    """

    method: str
    seed: int
    after: dict[str, float]
    before: dict[str, float] | None
    experts_per_token: float
    parameters: int
    tokens_per_second: float
    peak_memory_gb: float | None


def row_of(method: str, seed: int, run: Path) -> Row:
    """Read a finished run's folder."""
    evaluations, metrics = read_jsonl(run / "evaluations.jsonl"), read_jsonl(run / "metrics.jsonl")
    last = metrics[-max(1, len(metrics) // 4) :]
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as file:
        # A safetensors file has keys() only.
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return Row(
        method,
        seed,
        after=evaluations[-1],
        before=evaluations[0] if evaluations[0]["step"] == 0 else None,
        experts_per_token=statistics.mean(line["experts_per_token"] for line in last),
        parameters=parameters,
        tokens_per_second=statistics.median(line["tokens_per_second"] for line in metrics),
        peak_memory_gb=max((line["peak_memory_gb"] for line in metrics if "peak_memory_gb" in line), default=None),
    )


class Store:
    """See the head of this file.

    Args:
        folder: of the comparison; made if need be.
        about: what its runs depend on; None only reads.

    Raises:
        UserError: where the folder cannot be used, or holds a comparison of something else.
    """

    def __init__(self, folder: Path, about: dict[str, Any] | None) -> None:
        self.folder, self.table = folder, folder / CELLS
        path = folder / ABOUT
        if about is None and not path.is_file():
            raise UserError(f"{folder} holds no comparison: run one first, or give its folder as --output")
        with write_errors(str(folder)):
            if not path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                atomic_write(path, json.dumps(about, indent=1) + "\n")
            text = path.read_text()
        try:
            self.about: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): choose another --output") from error
        if about is not None and (differing := [k for k in about if self.about.get(k) != about[k]]):
            was = "; ".join(f"{k} {self.about.get(k)}, here {about[k]}" for k in differing)
            raise UserError(
                f"{folder} holds a comparison of something else ({was}): choose another --output, or --page-only for its page"
            )

    def rows(self) -> list[Row]:
        """All finished runs.

        Raises:
            UserError: naming a line that cannot be read.
        """
        rows = []
        for number, values in enumerate(read_jsonl(self.table), start=1):
            try:
                rows.append(Row(**values))
            except TypeError as error:
                raise UserError(f"{self.table}, line {number} cannot be read ({error}): delete that line") from error
        return rows

    def add(self, row: Row) -> None:
        """Append a row; it is on the disk when this returns."""
        with write_errors(str(self.table)):
            append_jsonl(self.table, [asdict(row)])


def commit() -> str:
    """Of the code that runs, as far as git knows it."""
    where = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=where, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}, with changes" if changes else head
