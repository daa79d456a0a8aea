"""What a run reports, in its folder: metrics, evaluations and routing, as JSON lines and in TensorBoard."""

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
    """Writes on one rank; on the others it does nothing.

    Only one rank can fail to write, and the others must not be left behind in a collective: an error is kept, what comes after
    it is not written, and `check` raises it once all ranks have been told.

    Args:
        folder: of the run.
        writes: whether this rank does.
        first_step: optimizer steps already done: later ones in existing files belong to a run that was cut off after its last
            checkpoint and are dropped.

    Raises:
        UserError: where the files cannot be opened.
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
        """Report optimizer step `step` (from 1)."""
        if not self._writes or self.failed:
            return
        with self._keeping_an_error():
            self._metrics.append(step, report.metrics)
            write_scalars(self._tensorboard, step, dict(_scalars(report.metrics, "train")))
            if report.routing:
                self._routing.append(step, {"linears": _rounded(report.routing)})
                if not self._layout_written:
                    write_layout(self._tensorboard, report.metrics, report.routing)
                    self._layout_written = True
                write_routing(self._tensorboard, step, report.routing)

    def evaluation(self, step: int, values: dict[str, float], changed: dict[str, float]) -> None:
        """Report an evaluation after `step` optimizer steps.

        Args:
            step: as said.
            values: name -> number.
            changed: name of a linear -> share of the probe set's tokens whose experts changed; empty if not known.
        """
        if not self._writes or self.failed:
            return
        with self._keeping_an_error():
            if changed:
                values = values | {"support_changed": sum(changed.values()) / len(changed)}
                write_changes(self._tensorboard, step, changed)
            self._evaluations.append(step, values)
            write_scalars(self._tensorboard, step, dict(_scalars(values, "eval")))

    @property
    def failed(self) -> bool:
        """Whether something could not be written, on this rank."""
        return self._error is not None

    def check(self) -> None:
        """Raises UserError where something could not be written, on this rank."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Write out what TensorBoard has pending."""
        if self._writes:
            with self._keeping_an_error():
                for file in (self._metrics, self._evaluations, self._routing, self._tensorboard):
                    file.close()

    @contextmanager
    def _keeping_an_error(self) -> Iterator[None]:
        try:
            with write_errors(self._what):
                yield
        except UserError as error:
            self._error = self._error or error


def _scalars(values: dict[str, Any], section: str, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested dictionaries: those at the top in the folder `section` of TensorBoard, others in "outer/inner"."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, section, f"{prefix}{name}/")
        else:
            yield f"{prefix or section + '/'}{name}", value


def _rounded(value: Any) -> Any:
    """To five digits: a detailed report has thousands of numbers."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
