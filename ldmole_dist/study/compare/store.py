"""The folder of a comparison: about.json, and cells.jsonl with one line per finished run."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open

from ldmole_dist.io import read_jsonl
from ldmole_dist.study.folder import StudyFolder


@dataclass(frozen=True)
class Row:
    """A finished run; the fields are keys of cells.jsonl.

    Args:
        method: name of the method, a key of `methods.METHODS`.
        seed: seed of initial values, dropout and data order.
        after: metrics of the last evaluation.
        before: metrics of the evaluation before training; None for all runs but the first, because they would be equal
            for all runs.
        experts_per_token: number of active experts, mean over tokens, linears and the last quarter of the logged steps.
        parameters: number of parameters in the adapter.
        tokens_per_second: training throughput, median over the logged steps.
        peak_memory_gb: peak memory of the GPU, or of the process on a CPU, in GB; None if the run wrote no detailed
            report.
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
    """Read the row of a finished run from its files.

    Args:
        method: name of the method.
        seed: seed of the run.
        run: output folder of the run.
    """
    evaluations, metrics = read_jsonl(run / "evaluations.jsonl"), read_jsonl(run / "metrics.jsonl")
    last = metrics[-max(1, len(metrics) // 4) :]
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as file:
        # safe_open returns an object that has keys() but is not iterable.
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


class Store(StudyFolder):
    """The folder of a comparison.

    Args:
        folder: path of the folder.
        about: description of what the results depend on; None opens an existing folder for reading.

    Raises:
        UserError: if the folder cannot be used, see `StudyFolder`.
    """

    def __init__(self, folder: Path, about: Mapping[str, str] | None) -> None:
        super().__init__(folder, about, "about.json", "cells.jsonl")

    def rows(self) -> list[Row]:
        """Return all finished runs in the order in which they finished.

        Raises:
            UserError: if a line cannot be read.
        """
        return self.parsed(lambda line: Row(**json.loads(line)))

    def add(self, row: Row) -> None:
        """Append a finished run and sync it to disk.

        Raises:
            UserError: if the row cannot be written.
        """
        self.append(json.dumps(asdict(row)))


def commit() -> str:
    """Return the git commit of this package, followed by ", with changes" if a tracked file is modified.

    Returns "unknown" if git fails, such as outside a repository.
    """
    folder = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}, with changes" if changes else head
