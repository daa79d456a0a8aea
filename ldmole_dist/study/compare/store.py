"""The folder of a comparison: about.json, and a line of cells.jsonl for each finished run."""

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
        method: name in `methods.METHODS`.
        seed: seed of initial values, dropout and data order.
        after: metrics of the evaluation after training.
        before: metrics of the evaluation before training, which is the same for all runs; only one run has it.
        experts_per_token: active experts, mean over linears and tokens in the last quarter of the steps.
        parameters: parameters of the adapter.
        tokens_per_second: median over the steps.
        peak_memory_gb: peak memory of the GPU, or of the process on a CPU; None if there was no detailed report.
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
    """Return the row of a finished run, read from its folder."""
    evaluations, metrics = read_jsonl(run / "evaluations.jsonl"), read_jsonl(run / "metrics.jsonl")
    last = metrics[-max(1, len(metrics) // 4) :]
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as file:
        # safe_open's object is not iterable, it only has keys().
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
    """The folder of a comparison; see `StudyFolder` for the arguments and errors."""

    def __init__(self, folder: Path, about: Mapping[str, str] | None) -> None:
        super().__init__(folder, about, "about.json", "cells.jsonl")

    def rows(self) -> list[Row]:
        """Return all finished runs; raise UserError for a line that cannot be read."""
        return self.parsed(lambda line: Row(**json.loads(line)))

    def add(self, row: Row) -> None:
        """Append a finished run and synchronize it to disk."""
        self.append(json.dumps(asdict(row)))


def commit() -> str:
    """Return the git commit of this package and whether it has uncommitted changes, or "unknown"."""
    folder = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}, with changes" if changes else head
