"""Writer of a run's reports: metrics, evaluations and routing, as JSON lines and in TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ldmole_dist.errors import UserError
from ldmole_dist.io import write_errors
from ldmole_dist.monitor.board import write_changes, write_layout, write_routing, write_scalars
from ldmole_dist.monitor.lines import JsonLines
from ldmole_dist.monitor.meter import Report


class Monitor:
    """Writer of a run's reports on one rank; on the other ranks it does nothing.

    A write error is not raised at once, because the other ranks would then wait for this rank in the next collective. The error
    is stored, and later reports are skipped. Reduce `failed` over all ranks, then call `check`, which raises the error.

    Args:
        folder: output folder of the run.
        writes: whether this rank writes.
        first_step: number of optimizer steps already done. Later steps in existing files were reported after the checkpoint
            that the run resumes from, and are removed.

    Raises:
        UserError: if the files cannot be opened.
    """

    def __init__(self, folder: Path, writes: bool, first_step: int) -> None:
        self._writes, self._what = writes, f"the reports of the run in {folder}"
        self._error: UserError | None = None
        if not writes:
            return
        with write_errors(self._what):
            self._metrics = JsonLines(folder / "metrics.jsonl", first_step)
            self._evaluations = JsonLines(folder / "evaluations.jsonl", first_step)
            self._routing = JsonLines(folder / "routing.jsonl", first_step)
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._layout_written = False

    def step(self, step: int, report: Report) -> None:
        """Write the report of optimizer step `step` (from 1)."""
        if not self._writes or self.failed:
            return
        with self._storing_error():
            self._metrics.append(step, report.metrics)
            write_scalars(self._tensorboard, step, dict(_scalars(report.metrics, "train")))
            if report.routing:
                self._routing.append(step, {"linears": _rounded(report.routing)})
                if not self._layout_written:
                    write_layout(self._tensorboard, report.metrics, report.routing)
                    self._layout_written = True
                write_routing(self._tensorboard, step, report.routing)

    def evaluation(self, step: int, values: dict[str, float], changed: dict[str, float]) -> None:
        """Write the report of an evaluation.

        Args:
            step: number of optimizer steps done.
            values: name of a metric -> value.
            changed: return value of `Probe.changed`; empty at the first evaluation.
        """
        if not self._writes or self.failed:
            return
        with self._storing_error():
            if changed:
                values = values | {"support_changed": sum(changed.values()) / len(changed)}
                write_changes(self._tensorboard, step, changed)
            self._evaluations.append(step, values)
            write_scalars(self._tensorboard, step, dict(_scalars(values, "eval")))

    @property
    def failed(self) -> bool:
        """Whether a report could not be written on this rank."""
        return self._error is not None

    def check(self) -> None:
        """Raise the UserError of the first report that could not be written on this rank, if there is one."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Flush and close all files."""
        if self._writes:
            with self._storing_error():
                for file in (self._metrics, self._evaluations, self._routing, self._tensorboard):
                    file.close()

    @contextmanager
    def _storing_error(self) -> Iterator[None]:
        """Context manager that stores a write error of its body, if it is the first one, instead of raising it."""
        try:
            with write_errors(self._what):
                yield
        except UserError as error:
            self._error = self._error or error


def _scalars(values: dict[str, Any], section: str, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (TensorBoard tag, value) of each number; the tag is "section/name", or "outer/inner" within a dictionary."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, section, f"{prefix}{name}/")
        else:
            yield f"{prefix or section + '/'}{name}", value


def _rounded(value: Any) -> Any:
    """Return a copy with floats rounded to five significant digits, because a detailed report has thousands of them."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
