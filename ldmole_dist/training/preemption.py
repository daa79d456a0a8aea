"""Stop requests: SIGTERM (a scheduler's preemption or time limit) and SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that records SIGTERM and SIGINT instead of ending the process.

    The training loop reads `requested` at the end of each step. If it is set on any rank, all ranks save a checkpoint and stop,
    unless that step was the last. A second SIGINT interrupts the process as usual. Later SIGTERMs are ignored: on Ctrl-C,
    DeepSpeed's launcher at once sends SIGTERM to the ranks, which have not saved yet. The launcher kills a rank that still runs
    30 s later.

    Attributes:
        requested: whether a signal was received.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python can set signal handlers only there
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
