"""Being asked to end: SIGTERM (a scheduler that needs the machine, a time limit) or SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within it such a signal is only taken note of, for the ranks to agree on at the next step's end. A second SIGINT ends the
    process as usual. A SIGTERM after another signal changes nothing: DeepSpeed's launcher, which gets a Ctrl-C too, passes
    one on at once, and kills what is left after 30 s.

    Attributes:
        requested: whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._usual: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # nobody else may
            self._usual = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._usual[signal.SIGINT])
        self.requested = True

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        self._usual = {}
