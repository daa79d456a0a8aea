"""Time of named parts of a step on the device, measured without synchronizing the host.

On a CPU the parts are timed with the host's clock, on an accelerator with events on the current stream, which are read after
the step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Accumulated time of named parts.

    Attributes:
        on: whether `measure` records anything; off by default, as recording an event costs host time.
    """

    def __init__(self) -> None:
        self.on = False
        self._host: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.Event, torch.Event]] = []

    def clear(self) -> None:
        """Drop all measurements."""
        self._host.clear()
        self._events.clear()

    @contextmanager
    def measure(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the time of the body to `part`."""
        if not self.on:
            yield
        elif device.type == "cpu":
            started = time.perf_counter()
            yield
            self._host[part] += time.perf_counter() - started
        else:
            start, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((part, start, end))

    def seconds(self, part: str) -> float:
        """Return the seconds spent in `part` since the last `clear`. Waits for the device."""
        total = self._host[part]
        for name, start, end in self._events:
            if name == part:
                end.synchronize()
                total += start.elapsed_time(end) / 1e3
        return total
