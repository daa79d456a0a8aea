"""How long named parts of a step take on the device, without making the host wait for it.

On a CPU the host's clock, elsewhere events on the device's stream, which are read when the step is over. Off, it costs nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of parts that may be measured many times.

    Attributes:
        on: whether it measures.
    """

    def __init__(self) -> None:
        self.on = False
        self._host: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.Event, torch.Event]] = []

    def clear(self) -> None:
        """Begin again."""
        self._host.clear()
        self._events.clear()

    @contextmanager
    def measured(self, part: str, device: torch.device) -> Iterator[None]:
        """What runs within counts for `part`."""
        if not self.on:
            yield
        elif device.type == "cpu":
            begun = time.perf_counter()
            yield
            self._host[part] += time.perf_counter() - begun
        else:
            begin, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))

    def seconds(self, part: str) -> float:
        """Of all measurements of `part` since the last `clear`; waits for the device."""
        total = self._host[part]
        for name, begin, end in self._events:
            if name == part:
                end.synchronize()
                total += begin.elapsed_time(end) / 1e3
        return total
