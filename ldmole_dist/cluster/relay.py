"""Passing on what a rank prints, and remembering its last lines."""

from __future__ import annotations

import os
import select
import threading
import time
from typing import IO

KEPT = 8192  # bytes
REDRAWN_SECONDS = 10.0  # between states of a progress bar in a log


class Relay(threading.Thread):
    """Copies a pipe to a file descriptor. A thread, because a reader that has stopped reading must not stop the supervisor.

    Where that is no terminal, lines are copied whole, and of a progress bar that draws over itself a state now and then: pdsh
    holds back what does not end a line, and a log would be all bars.

    Args:
        source: a rank's output.
        target: file descriptor.

    Attributes:
        broken: whether nobody reads the target any more.
    """

    def __init__(self, source: IO[bytes], target: int) -> None:
        super().__init__(daemon=True)
        self.broken = False
        self._source, self._target, self._terminal = source, target, os.isatty(target)
        self._last = self._line = b""
        self._redrawn = time.monotonic()

    def run(self) -> None:
        """Copy until the source ends."""
        while chunk := os.read(self._source.fileno(), 65536):
            self._last = (self._last + chunk)[-KEPT:]
            self._write(chunk if self._terminal else self._lines(chunk))
        self._write(self._line)

    def last_lines(self, number: int) -> list[str]:
        """The last lines that are not empty; of a progress bar, what was drawn last."""
        lines = [line.rstrip().split("\r")[-1] for line in self._last.decode(errors="replace").split("\n")]
        return [line for line in lines if line.strip()][-number:]

    def _lines(self, chunk: bytes) -> bytes:
        *lines, self._line = (self._line + chunk.replace(b"\x1b[A", b"")).split(b"\n")
        out = b"".join(line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n" for line in lines)
        drawn, _, drawing = self._line.rpartition(b"\r")
        now = time.monotonic()
        if drawn.strip() and now - self._redrawn > REDRAWN_SECONDS:
            self._redrawn = now
            out += drawn.rpartition(b"\r")[2] + b"\n"
            self._line = drawing
        return out

    def _write(self, data: bytes) -> None:
        while data and not self.broken:
            try:
                data = data[os.write(self._target, data) :]
            except BlockingIOError:  # whoever else has this open may have made it so
                writable = select.poll()
                writable.register(self._target, select.POLLOUT)
                writable.poll()
            except OSError:
                self.broken = True
