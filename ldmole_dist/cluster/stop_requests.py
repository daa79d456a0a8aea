"""Stop requests to a job by signals to `ldmole launch`; a second request is distinguished from a repeated signal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# One event often sends several signals (a closing terminal, a scheduler that signals the processes of a job one by one).
SAME_REQUEST_SECONDS = 1.0


class StopRequestCounter:
    """Counter of stop requests. All signals within SAME_REQUEST_SECONDS of the first signal of a request belong to the request.

    Attributes:
        count: number of requests.
    """

    def __init__(self) -> None:
        self.count, self._last = 0, -SAME_REQUEST_SECONDS

    def add(self) -> bool:
        """Record a signal, and return whether it is a new request."""
        now = time.monotonic()
        if now - self._last <= SAME_REQUEST_SECONDS:
            return False
        self.count, self._last = self.count + 1, now
        return True


class StopSignals:
    """Context manager that turns SIGINT, SIGTERM and SIGHUP into stop requests.

    Attributes:
        received: whether a signal was received.
        on_stop: function to call at each signal, or None.
    """

    def __init__(self) -> None:
        self.received = False
        self.on_stop: Callable[[], None] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP; leave it ignored
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self.on_stop is not None:
            self.on_stop()
