"""The folder of a study: a table of measurements, and a description of what they depend on.

The rows of a table are compared with each other, so all of them must come from one machine, one version of the code,
one set of library versions and one set of settings. Each row is synced to disk when it is measured, so that an
interrupted study resumes with the missing rows. To measure a row again, delete its line.
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
    """Folder with a table, one line per row, and a JSON file that describes what the rows depend on.

    Args:
        path: folder of the study; created if `about` is given and the folder does not exist.
        about: machine, versions and settings that the rows depend on, by name; must equal those stored in the folder.
            None opens an existing folder for reading without this check.
        about_name: file name of the description.
        table_name: file name of the table.

    Attributes:
        path: folder of the study.
        table: path of the table.
        about: the stored description.

    Raises:
        UserError: if the folder cannot be read or created, is damaged or was measured with another `about`, or if `about`
            is None and the folder holds no study.
    """

    def __init__(self, path: Path, about: Mapping[str, str] | None, about_name: str, table_name: str) -> None:
        self.path, self.table = path, path / table_name
        file = path / about_name
        if about is None and not file.is_file():
            raise UserError(
                f"{path} holds no study ({about_name} is missing); set --output to the folder of a study, or run one first"
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
                f"{path} holds a study with other settings ({values}); choose another --output for a new study, "
                "or add --page-only to write the page of the existing one"
            )

    def parsed(self, parse: Callable[[str], T], first: int = 0) -> list[T]:
        """Parse the complete lines of the table.

        Args:
            parse: function that parses one line; it may raise ValueError, TypeError or KeyError.
            first: number of lines to skip, such as a header.

        Returns:
            The parsed lines, in order.

        Raises:
            UserError: if a line cannot be parsed.
        """
        rows = []
        for number, line in enumerate(islice(read_lines(self.table), first, None), start=first + 1):
            try:
                rows.append(parse(line.decode()))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.table}, line {number} cannot be read ({error}); delete that line to measure the row again"
                ) from error
        return rows

    def append(self, line: str) -> None:
        """Append a line to the table and sync it to disk.

        Raises:
            UserError: if the line cannot be written; the earlier lines are kept.
        """
        with write_errors(str(self.table)):
            append_lines(self.table, [line])
