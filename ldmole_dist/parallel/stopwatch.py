"""Timing of named parts of a step on the device, without synchronizing during the step.

On a CPU the parts are timed with the host's clock. On an accelerator they are timed with events on the current stream, which
are read after the step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Accumulates the time of named parts.

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
        """Context manager that adds the time of its body to `part`, if `on`.

        Args:
            part: name of the part.
            device: device that the body computes on.
        """
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
