"""Relay of the output of a rank, with its last lines kept for error reports."""

from __future__ import annotations

import os
import select
import threading
import time
from typing import IO

KEPT_BYTES = 8192  # number of last output bytes that are kept for error reports
PROGRESS_BAR_SECONDS = 10.0  # interval at which the state of a progress bar is written to a log


class Relay(threading.Thread):
    """Thread that copies a pipe to a file descriptor.

    It is a thread so that a blocked target does not block the supervisor. If the target is not a terminal, only complete lines
    are copied, because pdsh holds back incomplete lines. A progress bar that redraws itself is then copied only every
    PROGRESS_BAR_SECONDS, because it would otherwise fill a log file.

    Args:
        source: pipe with the output of a rank.
        target: file descriptor to copy to.

    Attributes:
        broken: whether writing to the target failed, for example because its reader has exited.
    """

    def __init__(self, source: IO[bytes], target: int) -> None:
        super().__init__(daemon=True)
        self.broken = False
        self._source, self._target, self._terminal = source, target, os.isatty(target)
        self._tail = self._incomplete_line = b""
        self._bar_written_at = time.monotonic()

    def run(self) -> None:
        """Copy until the source is closed."""
        while chunk := os.read(self._source.fileno(), 65536):
            self._tail = (self._tail + chunk)[-KEPT_BYTES:]
            self._write(chunk if self._terminal else self._complete_lines(chunk))
        self._write(self._incomplete_line)

    def last_lines(self, count: int) -> list[str]:
        """Return the last non-empty lines; a progress bar counts as one line, with its last state.

        Args:
            count: maximum number of lines.
        """
        lines = [line.rstrip().split("\r")[-1] for line in self._tail.decode(errors="replace").split("\n")]
        return [line for line in lines if line.strip()][-count:]

    def _complete_lines(self, chunk: bytes) -> bytes:
        """Return the bytes to write to a log after a chunk was read.

        These are the complete lines, each without what a carriage return overwrote, and, every PROGRESS_BAR_SECONDS, the state
        of a progress bar on the incomplete line. The rest of the chunk is kept for the next call.
        """
        # tqdm moves the cursor up (ESC [A) after it has drawn a nested bar.
        *lines, self._incomplete_line = (self._incomplete_line + chunk.replace(b"\x1b[A", b"")).split(b"\n")
        out = b"".join(line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n" for line in lines)
        drawn, _, drawing = self._incomplete_line.rpartition(b"\r")
        now = time.monotonic()
        if drawn.strip() and now - self._bar_written_at > PROGRESS_BAR_SECONDS:
            self._bar_written_at = now
            out += drawn.rpartition(b"\r")[2] + b"\n"
            self._incomplete_line = drawing
        return out

    def _write(self, data: bytes) -> None:
        while data and not self.broken:
            try:
                data = data[os.write(self._target, data) :]
            except BlockingIOError:
                # The target is non-blocking because another process that shares it has set O_NONBLOCK.
                writable = select.poll()
                writable.register(self._target, select.POLLOUT)
                writable.poll()
            except OSError:
                self.broken = True
