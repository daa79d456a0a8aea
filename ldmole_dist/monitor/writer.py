"""What a run reports, in its folder: metrics, evaluations and routing, as JSON lines and in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from ldmole_dist.checkpoint.files import explained
from ldmole_dist.monitor.board import write_changes, write_layout, write_routing
from ldmole_dist.monitor.meter import Report


class Monitor:
    """Writes on one rank; on the others it does nothing.

    Args:
        folder: of the run.
        writes: whether this rank does.
        first_step: optimizer steps already done: later ones in existing files belong to a run that was cut off after its last
            checkpoint and are dropped.
    """

    def __init__(self, folder: Path, writes: bool, first_step: int) -> None:
        self.writes, self._folder = writes, folder
        if not writes:
            return
        self._metrics = _reopened(folder / "metrics.jsonl", first_step)
        self._evaluations = _reopened(folder / "evaluations.jsonl", first_step)
        self._routing = _reopened(folder / "routing.jsonl", first_step)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._layout_written = False

    def step(self, step: int, report: Report) -> None:
        """Report optimizer step `step` (from 1)."""
        if not self.writes:
            return
        with self._explained():
            self._write(self._metrics, step, report.metrics, "train")
            if report.routing:
                _append(self._routing, step, {"linears": _rounded(report.routing)})
                self._write_layout(report.routing)
                write_routing(self._tensorboard, step, report.routing)

    def evaluation(self, step: int, values: dict[str, float], changed: dict[str, float]) -> None:
        """Report an evaluation after `step` optimizer steps.

        Args:
            step: as said.
            values: name -> number.
            changed: name of a linear -> share of the probe set's tokens whose experts changed; empty if not known.
        """
        if not self.writes:
            return
        with self._explained():
            if changed:
                values = values | {"support_changed": sum(changed.values()) / len(changed)}
                write_changes(self._tensorboard, step, changed)
            self._write(self._evaluations, step, values, "eval")

    def close(self) -> None:
        """Write out what is pending."""
        if self.writes:
            for file in (self._metrics, self._evaluations, self._routing, self._tensorboard):
                file.close()

    def _write(self, file: TextIO, step: int, values: dict[str, Any], section: str) -> None:
        _append(file, step, values)
        for name, value in _scalars(values):
            self._tensorboard.add_scalar(name if "/" in name else f"{section}/{name}", value, step)

    def _write_layout(self, linears: dict[str, Any]) -> None:
        if not self._layout_written:
            write_layout(self._tensorboard, linears)
            self._layout_written = True

    def _explained(self) -> Any:
        return explained(f"what the run in {self._folder} reports")


def _append(file: TextIO, step: int, values: dict[str, Any]) -> None:
    file.write(json.dumps({"step": step, **_plain(values)}) + "\n")
    file.flush()


def _plain(value: Any) -> Any:
    """As JSON can hold it: it has no infinity, the gradient norm of a skipped step is null."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: Any) -> Any:
    """To five digits: a detailed report has thousands of numbers."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested dictionaries, named "outer/inner": folders in TensorBoard."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _reopened(path: Path, last_step: int) -> TextIO:
    """Open for appending, with the lines after `last_step` and a line that was cut off in the writing dropped."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n") and json.loads(line)["step"] <= last_step:
            kept.append(line)
    path.write_text("".join(kept))
    return path.open("a", encoding="utf-8")
