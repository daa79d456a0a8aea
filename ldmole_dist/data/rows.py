"""Reading JSON lines and checking every row before anything is trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmole_dist.errors import UserError

FIELDS = {"causal_lm": ("prompt", "completion"), "sequence_classification": ("text", "label")}


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        source: what the model reads: a prompt, or the text to classify.
        target: what it should answer: a completion, or a class name.
        where: file and line, for messages.
        domain: what kind of text it is ("code"), where the file says; the routing report groups by it.
    """

    source: str
    target: str
    where: str
    domain: str | None = None


def read_rows(path: str, task: str, labels: Sequence[str] | None, limit: int | None = None) -> list[Row]:
    """All rows of a file.

    Args:
        path: of a file with one JSON object a line; blank lines are passed over.
        task: "causal_lm" (fields prompt, completion) or "sequence_classification" (text, label);
            each row may have a "domain" too.
        labels: if given, every target must be one of them.
        limit: read so many rows only.

    Raises:
        UserError: naming file and line, where a row is not as above; naming the file, where there is none.
    """
    source_field, target_field = FIELDS[task]
    rows: list[Row] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                row = _parse(line, where)
                for name in (source_field, target_field):
                    if not isinstance(row.get(name), str):
                        raise UserError(
                            f"{where}: needs a text {name!r}, has {row.get(name)!r}; its keys are {sorted(row)}"
                        )
                if labels is not None and row[target_field] not in labels:
                    raise UserError(
                        f"{where}: {target_field} {row[target_field]!r} is none of data.labels {list(labels)}: "
                        "correct the row or add the label"
                    )
                domain = row.get("domain")
                rows.append(Row(row[source_field], row[target_field], where, None if domain is None else str(domain)))
                if len(rows) == limit:
                    break
    except OSError as error:
        raise UserError(f"data file {path}: {error.strerror}; check data.train and data.eval") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text: {error}") from error
    if not rows:
        raise UserError(f"data file {path} holds no rows")
    return rows


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object, is {line.strip()!r:.60}")
    return row
