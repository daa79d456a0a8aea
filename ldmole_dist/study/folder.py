"""The folder of a study: a table of measurements, and a description of what they depend on.

The rows of a table are compared with each other, so all of them must come from one machine, one version of the code,
one set of library versions and one set of settings. Each row is synced to disk when it is measured, so that an
interrupted study resumes with the missing rows. To measure a row again, delete its line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from ldmole_dist.errors import UserError
from ldmole_dist.io import append_jsonl, atomic_write, read_lines, write_errors

T = TypeVar("T")


class StudyFolder(Generic[T]):
    """Folder with cells.jsonl, one line per row, and about.json, which describes what the rows depend on.

    Args:
        path: folder of the study; created if `about` is given and the folder does not exist.
        about: machine, versions and settings that the rows depend on, by name; must equal those stored in the folder.
            None opens an existing folder for reading without this check.
        row: function that makes a row, a dataclass instance, from the values of a line as keyword arguments.

    Attributes:
        path: folder of the study.
        table: path of cells.jsonl.
        about: the stored description.

    Raises:
        UserError: if the folder cannot be read or created, is damaged or was measured with another `about`, or if `about`
            is None and the folder holds no study.
    """

    def __init__(self, path: Path, about: Mapping[str, str] | None, row: Callable[..., T]) -> None:
        self.path, self.table, self._row = path, path / "cells.jsonl", row
        file = path / "about.json"
        if about is None and not file.is_file():
            raise UserError(
                f"{path} holds no study (about.json is missing); set --output to the folder of a study, or omit --page-only"
            )
        try:
            if about is not None and not file.is_file():
                path.mkdir(parents=True, exist_ok=True)
                atomic_write(file, json.dumps(about, indent=1) + "\n")
            self.about: dict[str, str] = json.loads(file.read_text())
        except OSError as error:
            raise UserError(
                f"cannot use --output {path}: {error.strerror}; choose a folder that you can write to"
            ) from error
        except ValueError as error:
            raise UserError(f"{file} is damaged: it is not valid JSON ({error}); choose another --output") from error
        asked = about or {}
        if differing := [key for key in asked if self.about.get(key) != asked[key]]:
            values = "; ".join(f"{key} {self.about.get(key)}, now {asked[key]}" for key in differing)
            raise UserError(
                f"{path} holds a study measured under other conditions ({values}); choose another --output for a new study, "
                "or add --page-only to write the page of the existing one"
            )

    def rows(self) -> list[T]:
        """Return all rows in the order in which they were measured.

        Raises:
            UserError: if a line cannot be read.
        """
        rows = []
        for number, line in enumerate(read_lines(self.table), start=1):
            try:
                rows.append(self._row(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{self.table}, line {number} cannot be read ({error}); delete that line to measure the row again"
                ) from error
        return rows

    def add(self, row: Any) -> None:
        """Append a row and sync it to disk.

        Raises:
            UserError: if the row cannot be written; the earlier rows are kept.
        """
        with write_errors(str(self.table)):
            append_jsonl(self.table, [asdict(row)])
