"""The rows of a scaling study, one per cell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmole_dist.engine.ds_config import SHIPPED
from ldmole_dist.selftest.local_ranks import RankFailed
from ldmole_dist.study.machine import machine
from ldmole_dist.study.scaling.cells import Cell
from ldmole_dist.study.scaling.measure import WARMUP, Measured


@dataclass(frozen=True)
class Row:
    """The outcome of one cell.

    Args:
        cell: configuration.
        measured: results; None if the cell failed.
        error: why the cell failed; None if it was measured.
    """

    cell: Cell
    measured: Measured | None = None
    error: str | None = None


def stored_row(cell: Mapping[str, Any], measured: Mapping[str, Any] | None, error: str | None) -> Row:
    """Return the row with the values of a line of cells.jsonl."""
    return Row(Cell(**cell), None if measured is None else Measured(**measured), error)


def reason(error: Exception) -> str:
    """Return why a cell failed, as one line of at most 300 characters.

    For a `RankFailed`, this is the last line of its message: the error of the first rank that failed, or the ranks that did
    not return. For other errors, it is the type and the message, or the last line of a message with several lines.
    """
    text = str(error) if isinstance(error, RankFailed) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[-1].strip()[:300]


def environment(steps: int) -> dict[str, str]:
    """Return what the results depend on besides the cell: machine, library versions, code and numbers of steps.

    Args:
        steps: number of timed steps.
    """
    return machine() | {"code": code(), "warmup_steps": str(WARMUP), "timed_steps": str(steps)}


def code(package: Path = Path(__file__).parents[2], ds_configs: Path = SHIPPED) -> str:
    """Return the first 12 hexadecimal digits of a SHA-256 of all modules of the package and its DeepSpeed configs."""
    digest = hashlib.sha256()
    for path in [*sorted(package.rglob("*.py")), *sorted(ds_configs.glob("*.json"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
