"""Files of JSON lines, one for each optimizer step or evaluation, that a run appends to and that may have been cut off."""

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
    """A file to append to. Nothing is buffered: what `append` returned from is with the operating system.

    Args:
        path: of the file; made if need be.
        last_step: later lines, and one that was cut off in the writing, are dropped.

    Raises:
        OSError: where it cannot be written.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._file = path.open("ab", buffering=0)
        self._file.truncate(_end_of(path, last_step))

    def append(self, step: int, values: dict[str, Any]) -> None:
        """Write `{"step": step, ...}`.

        Raises:
            OSError: where there is no room.
        """
        line = json.dumps({"step": step, **_plain(values)}, allow_nan=False).encode() + b"\n"
        if self._file.write(line) < len(line):
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def _end_of(path: Path, last_step: int) -> int:
    """Where the lines up to `last_step` end, without reading more than the beginning of each."""
    end = 0
    for line in read_lines(path):
        found = _STEP.match(line)
        if found is None or int(found[1]) > last_step:
            break
        end += len(line)
    return end


def _plain(value: Any) -> Any:
    """As JSON can hold it: it has no infinity, the gradient norm of a skipped step is null."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
