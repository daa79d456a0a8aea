"""The rows of a comparison, one per finished run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from ldmole_dist.io import read_jsonl


@dataclass(frozen=True)
class Row:
    """A finished run; the fields are keys of cells.jsonl.

    Args:
        method: name of the method, a key of `methods.METHODS`.
        seed: seed of initial values, dropout and data order.
        after: metrics of the last evaluation.
        before: metrics of the evaluation before training; None for all runs but the first, because these metrics are
            the same for all runs.
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
