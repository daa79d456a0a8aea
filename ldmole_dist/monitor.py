"""What a run reports: one JSON object for each optimizer step in metrics.jsonl, and the same numbers in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from ldmole_dist.checkpoint.files import explained


class Monitor:
    """Writes on one rank; on the others it does nothing.

    Args:
        folder: of the run.
        writes: whether this rank does.
        first_step: optimizer steps already done: later ones in an existing metrics.jsonl belong to a run that was cut off
            after its last checkpoint and are dropped.
    """

    def __init__(self, folder: Path, writes: bool, first_step: int) -> None:
        self.writes, self._folder = writes, folder
        if not writes:
            return
        self._metrics = _reopened(folder / "metrics.jsonl", first_step)
        self._evaluations = _reopened(folder / "evaluations.jsonl", first_step)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Report the numbers of optimizer step `step` (from 1)."""
        if self.writes:
            self._report(self._metrics, step, values, "train")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Report an evaluation after `step` optimizer steps, in evaluations.jsonl."""
        if self.writes:
            self._report(self._evaluations, step, values, "eval")

    def _report(self, file: TextIO, step: int, values: dict[str, Any], section: str) -> None:
        # JSON has no infinity: the gradient norm of a skipped step is null.
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        with explained(f"what the run in {self._folder} reports"):
            file.write(json.dumps({"step": step, **finite}) + "\n")
            file.flush()
            for name, value in _scalars(values):
                self._tensorboard.add_scalar(name if "/" in name else f"{section}/{name}", value, step)

    def close(self) -> None:
        """Write out what is pending."""
        if self.writes:
            self._metrics.close()
            self._evaluations.close()
            self._tensorboard.close()


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
