"""Follower of a coordinator, on hosts other than host 0 of a job that is started by hand on each host (`--nodes`)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from ldmole_dist.cluster.failure_detection import FIRST_CONNECTION_SECONDS
from ldmole_dist.cluster.job_result import Failure, JobResult
from ldmole_dist.cluster.messages import LOST_SECONDS, Channel, wait_readable
from ldmole_dist.cluster.stop_requests import StopRequestCounter

LAUNCHER_SECONDS = 5.0  # delay before the exit of this host's launcher is reported: the result may still be in transit


class Follower:
    """Replacement for `Coordinator` on a host that does not run the coordinator.

    A follower has the methods and attributes of `Coordinator` that `launch.run_attempt` uses. It forwards stop requests to the
    coordinator and receives the result of the job.

    Args:
        address: IPv4 address or host name, and port of the coordinator.
        job: name of the job.
    """

    def __init__(self, address: tuple[str, int], job: str) -> None:
        self.address, self.job = address, job
        self._unsent_requests: list[bool] = []
        self._requests = StopRequestCounter()

    @property
    def stop_requested(self) -> bool:
        """Whether a stop was requested on this host."""
        return self._requests.count > 0

    def request_stop(self) -> None:
        """Record a stop request, which `serve` forwards to the coordinator. Safe to call from a signal handler."""
        if self._requests.add():
            self._unsent_requests.append(self._requests.count > 1)

    def serve(self, launcher_exit_code: Callable[[], int | None]) -> JobResult:
        """Wait until the job has ended, and return its result.

        The result is also a failure if the coordinator cannot be reached or is lost, or if the launcher exits or a stop is
        requested before the coordinator has accepted the connection.

        Args:
            launcher_exit_code: function that returns the exit code of this host's launcher, or None while it runs.
        """
        deadline = time.monotonic() + FIRST_CONNECTION_SECONDS
        while time.monotonic() < deadline and not self.stop_requested:
            if launcher_exit_code() is not None:
                failure = Failure("the launcher of this host", f"exited with code {launcher_exit_code()}")
                return JobResult(1, failure, self.stop_requested)
            try:
                channel = Channel(socket.create_connection(self.address, timeout=2))
            except OSError:
                time.sleep(0.5)
                continue
            try:
                result = self._follow(channel, launcher_exit_code)
            finally:
                channel.close()
            if result is not None:
                return result
            # The coordinator of the previous attempt, which is about to exit, may have rejected the connection.
            time.sleep(0.5)
        if self.stop_requested:
            return self._failed("had not accepted the connection of this host when a stop was requested")
        return self._failed(
            f"did not accept the connection of this host within {FIRST_CONNECTION_SECONDS:.0f} s; check that the same "
            "command runs there with --node-rank 0"
        )

    def close(self) -> None:
        """Do nothing: `serve` has closed the connection."""

    def _follow(self, channel: Channel, launcher_exit_code: Callable[[], int | None]) -> JobResult | None:
        """Exchange messages until the coordinator sends the result or is lost, and return the result.

        If the coordinator does not accept the connection, None is returned.
        """
        channel.send("follow", job=self.job)
        accepted, last_message_at = False, time.monotonic()
        launcher_exited_at: float | None = None
        while True:
            wait_readable([channel], 0.5)
            now = time.monotonic()
            for message in channel.receive():
                accepted, last_message_at = True, now
                if message["kind"] == "result":
                    return _parse_result(message)
            if channel.closed or now - last_message_at > LOST_SECONDS:
                return self._failed("exited, or its host is unreachable") if accepted else None
            while self._unsent_requests:
                channel.send("stop requested", repeated=self._unsent_requests.pop(0))
            if launcher_exit_code() is not None:
                launcher_exited_at = launcher_exited_at or now
                if now - launcher_exited_at > LAUNCHER_SECONDS:
                    channel.send("launcher exited", host=socket.gethostname(), exit_code=launcher_exit_code())
                    launcher_exited_at = now

    def _failed(self, description: str) -> JobResult:
        source = f"the coordinator at {self.address[0]}:{self.address[1]}"
        return JobResult(1, Failure(source, description), self.stop_requested)


def _parse_result(message: dict[str, Any]) -> JobResult:
    failure = message["failure"]
    return JobResult(message["exit_code"], None if failure is None else Failure(**failure), message["stop_requested"])
