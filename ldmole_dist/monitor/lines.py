"""JSON-lines files of a run, with one line per optimizer step or evaluation.

A resumed run removes the lines of steps after its checkpoint and appends to the files.
"""

from __future__ import annotations

import json
import math
import os
import re
from errno import ENOSPC
from pathlib import Path
from typing import Any

from ldmole_dist.io import read_lines

_STEP = re.compile(rb'\{"step": (\d+)')


class JsonLines:
    """JSON-lines file opened for appending.

    Writes are unbuffered, so that appended lines are kept if the process is killed.

    Args:
        path: path of the file, which is created if it does not exist.
        last_step: last step to keep. The first line that is of a later step, or does not start with a step, is removed with all
            lines after it. An incomplete last line is removed as well.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._file = path.open("ab", buffering=0)
        self._file.truncate(_end_of(path, last_step))

    def append(self, step: int, values: dict[str, Any]) -> None:
        """Append the line `{"step": step, ...}` with the values; NaN and infinity become null.

        Raises:
            OSError: if the line cannot be written in full.
        """
        line = json.dumps({"step": step, **_plain(values)}, allow_nan=False).encode() + b"\n"
        if self._file.write(line) < len(line):  # an unbuffered write to a full disk may write less, without an error
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _end_of(path: Path, last_step: int) -> int:
    """Return the length in bytes of the leading complete lines with steps up to `last_step`.

    Only the start of each line is parsed: a line of routing.jsonl can be large.
    """
    end = 0
    for line in read_lines(path):
        found = _STEP.match(line)
        if found is None or int(found[1]) > last_step:
            break
        end += len(line)
    return end


def _plain(value: Any) -> Any:
    """Return a copy with None in place of NaN and infinity, which JSON lacks.

    Infinity occurs in normal runs: the gradient norm of a skipped step is infinite.
    """
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
