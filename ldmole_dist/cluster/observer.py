"""The watch of a job as a host sees it that does not serve it: where the same command was given on each host by hand."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

from ldmole_dist.cluster.link import LOST_SECONDS, Link
from ldmole_dist.cluster.verdict import Failure, Verdict
from ldmole_dist.cluster.watch import START_SECONDS


class Observer:
    """Args:
    address: of the watch, with the port.
    job: its name.
    """

    def __init__(self, address: tuple[str, int], job: str) -> None:
        self.address, self.job = address, job
        self._link: Link | None = None
        self._stop_asked = False

    def request_stop(self) -> None:
        """Have the watch end the job; a signal handler may call it."""
        self._stop_asked = True

    def serve(self, launcher_code: Callable[[], int | None]) -> Verdict:
        """Until the job has ended.

        Args:
            launcher_code: exit code of the process that starts this host's supervisors, None while it runs.
        """
        deadline = time.monotonic() + START_SECONDS
        while self._link is None:
            try:
                self._link = Link(socket.create_connection(self.address, timeout=2))
            except OSError as error:
                if time.monotonic() > deadline or self._stop_asked or launcher_code() is not None:
                    return self._lost(f"nobody listens at {self.address[0]}:{self.address[1]}: {error}")
                time.sleep(0.5)
        self._link.send("observe", job=self.job)
        heard = time.monotonic()
        while True:
            select.select([self._link], [], [], 0.5)
            if self._stop_asked:
                self._stop_asked = False
                self._link.send("asked")
            for message in self._link.receive():
                heard = time.monotonic()
                if message["kind"] == "verdict":
                    failure = message["failure"]
                    return Verdict(message["code"], None if failure is None else Failure(**failure))
            if self._link.closed or time.monotonic() - heard > LOST_SECONDS:
                return self._lost("it is gone, or its host cannot be reached")

    def close(self) -> None:
        """End the connection."""
        if self._link is not None:
            self._link.close()

    def _lost(self, why: str) -> Verdict:
        return Verdict(1, Failure(f"the host with --node-rank 0 ({self.address[0]})", why))
