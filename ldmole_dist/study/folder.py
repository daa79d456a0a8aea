"""The folder of a study: what its measurements depend on, and a table that is on disk as soon as a row is measured.

A folder belongs to one machine, one state of the code, one set of library versions and one set of settings, since its rows are
compared with each other. An interrupted study resumes with the missing rows. To measure a row again, delete its line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ldmole_dist.errors import UserError
from ldmole_dist.io import append_lines, atomic_write, read_lines, write_errors

T = TypeVar("T")


class StudyFolder:
    """A folder with a JSON file about the measurements and a table of one line per row.

    Args:
        path: the folder; created if it does not exist.
        about: what the measurements depend on; None opens an existing folder of any machine, to read it.
        about_name: name of the JSON file.
        table_name: name of the table.

    Raises:
        UserError: if the folder cannot be used, or its measurements depend on something else.
    """

    def __init__(self, path: Path, about: Mapping[str, str] | None, about_name: str, table_name: str) -> None:
        self.path, self.table = path, path / table_name
        file = path / about_name
        if about is None and not file.is_file():
            raise UserError(f"{path} holds no study; run one first, or set --output to the folder of one")
        try:
            if about is not None and not file.is_file():
                path.mkdir(parents=True, exist_ok=True)
                atomic_write(file, json.dumps(about, indent=1) + "\n")
            self.about: dict[str, str] = json.loads(file.read_text())
        except OSError as error:
            raise UserError(
                f"--output {path}: {error.strerror} ({error.filename}); choose a folder that can be written"
            ) from error
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); choose another --output") from error
        asked = about or {}
        if differing := [key for key in asked if self.about.get(key) != asked[key]]:
            values = "; ".join(f"{key} {self.about.get(key)}, now {asked[key]}" for key in differing)
            raise UserError(
                f"{path} holds a study with other settings ({values}); choose another --output, "
                "or add --page-only to write the page of that study"
            )

    def parsed(self, parse: Callable[[str], T], first: int = 0) -> list[T]:
        """Return the parsed complete lines of the table, from line index `first` on.

        Raises:
            UserError: naming a line that cannot be parsed.
        """
        rows = []
        for number, line in enumerate(islice(read_lines(self.table), first, None), start=first + 1):
            try:
                rows.append(parse(line.decode()))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{self.table}, line {number} cannot be read ({error}); delete that line") from error
        return rows

    def append(self, line: str) -> None:
        """Append a line to the table and sync it to disk.

        Raises:
            UserError: if it cannot be written; the lines before it are kept.
        """
        with write_errors(str(self.table)):
            append_lines(self.table, [line])
