"""Stop requests: SIGTERM (a scheduler's preemption or time limit) and SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that records SIGTERM and SIGINT instead of ending the process.

    The training loop reads `requested` at the end of each step and saves a checkpoint. A second SIGINT ends the process as
    usual. A SIGTERM after another signal is ignored: DeepSpeed's launcher receives a Ctrl-C too and forwards it as SIGTERM at
    once, before the ranks could save; it kills the ranks that are left after 30 s.

    Attributes:
        requested: whether a signal was received.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            self._previous_handlers = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._previous_handlers[signal.SIGINT])
        self.requested = True
