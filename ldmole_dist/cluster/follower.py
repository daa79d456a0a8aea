"""The watch of a job as a host sees it that does not serve it: where the same command was given on each host by hand."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from ldmole_dist.cluster.coordinator import START_SECONDS, StopRequests
from ldmole_dist.cluster.messages import LOST_SECONDS, Link, readable
from ldmole_dist.cluster.verdict import Failure, Verdict

LAUNCHER_SECONDS = 5.0  # that ranks may outlast what has started them


class Observer:
    """Args:
    address: of the watch, with the port.
    job: its name.
    """

    def __init__(self, address: tuple[str, int], job: str) -> None:
        self.address, self.job = address, job
        self._asked: list[str] = []
        self._requests = StopRequests()

    @property
    def stop_requested(self) -> bool:
        """Whether this host asked for the end."""
        return self._requests.number > 0

    def request_stop(self) -> None:
        """Have the watch end the job; a signal handler may call it."""
        if self._requests.counts():
            self._asked.append("asked" if self._requests.number == 1 else "asked twice")

    def serve(self, launcher_code: Callable[[], int | None]) -> Verdict:
        """Until the job has ended.

        Args:
            launcher_code: exit code of the process that starts this host's supervisors, None while it runs.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and not self.stop_requested:
            if launcher_code() is not None:
                failure = Failure("the launcher of this host", f"ended with exit code {launcher_code()}")
                return Verdict(1, failure, self.stop_requested)
            try:
                link = Link(socket.create_connection(self.address, timeout=2))
            except OSError:
                time.sleep(0.5)
                continue
            try:
                verdict = self._listen(link, launcher_code)
            finally:
                link.close()
            if verdict is not None:
                return verdict
            time.sleep(0.5)  # it was the watch of an attempt before this one
        return self._failed("it never answered: is the same command running there, with --node-rank 0?")

    def close(self) -> None:
        """As a watch has it; nothing is left open."""

    def _listen(self, link: Link, launcher_code: Callable[[], int | None]) -> Verdict | None:
        link.send("observe", job=self.job)
        known, heard = False, time.monotonic()
        ended: float | None = None
        while True:
            readable([link], 0.5)
            now = time.monotonic()
            for message in link.receive():
                known, heard = True, now
                if message["kind"] == "verdict":
                    failure = message["failure"]
                    return Verdict(message["code"], None if failure is None else Failure(**failure), message["stopped"])
            if link.closed or now - heard > LOST_SECONDS:
                return self._failed("it is gone, or its host cannot be reached") if known else None
            while self._asked:
                link.send(self._asked.pop(0))
            if launcher_code() is not None:
                ended = ended or now
                if now - ended > LAUNCHER_SECONDS:
                    link.send("launcher ended", host=socket.gethostname(), code=launcher_code())
                    ended = now

    def _failed(self, why: str) -> Verdict:
        return Verdict(1, Failure(f"the watch at {self.address[0]}:{self.address[1]}", why), self.stop_requested)
