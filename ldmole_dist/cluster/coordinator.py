"""Coordinator of a job: starts all ranks together, and kills all of them if any rank fails.

One process of the job runs the coordinator (launch.py, or mpi_rendezvous.py inside mpirun); the supervisors of all ranks
(supervisor.py) connect to it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ldmole_dist.cluster.connections import Connections, RankStatus
from ldmole_dist.cluster.failure_detection import (
    find_lost_ranks,
    find_missing_ranks,
    find_stalled_rank,
    find_wrong_rank,
)
from ldmole_dist.cluster.job_result import Failure, JobResult, exit_code_for, failure_from_exit, root_cause
from ldmole_dist.cluster.messages import KEEPALIVE_SECONDS, LOST_SECONDS
from ldmole_dist.cluster.stop_requests import StopRequestCounter
from ldmole_dist.errors import EXIT_PREEMPTED

# Wait after a failure, or after the launcher has exited before the ranks: the report of the cause may arrive later.
GRACE_SECONDS = 2.0
SHUTDOWN_SECONDS = 8.0  # time for the supervisors to end their ranks and disconnect


class Coordinator:
    """Coordinator of one attempt to run a job.

    Args:
        address: IPv4 address or name of this host, at which the supervisors reach the coordinator.
        job: name of the job; the coordinator rejects connections that name another job.
        world_size: number of ranks.
        stall_seconds: seconds without a heartbeat from a rank after which the job is treated as stalled.
        print_status: function that prints a status line.
        port: TCP port to listen on; 0 selects a free one.
        report_failure: whether to print the failure as soon as it is known; if False, the caller prints it from the result.

    Attributes:
        address: IPv4 address or host name, and port at which the supervisors reach the coordinator.
        stop_requested: whether a stop was requested.

    Raises:
        UserError: if the coordinator cannot listen on the port.
    """

    def __init__(
        self,
        address: str,
        job: str,
        world_size: int,
        stall_seconds: float,
        print_status: Callable[[str], None],
        port: int = 0,
        report_failure: bool = False,
    ) -> None:
        self.connections = Connections(address, job, port)
        self.address = (address, self.connections.port)
        self.job, self.world_size, self.stall_seconds = job, world_size, stall_seconds
        self.print_status, self.report_failure = print_status, report_failure
        self.stop_requested = False
        self._requests, self._failures = StopRequestCounter(), list[Failure]()
        self._stop_sent = False
        self._started_at: float | None = None

    def request_stop(self) -> None:
        """Request that all ranks save and exit; a second request kills the ranks without saving.

        Safe to call from a signal handler. Calls in quick succession count as one request (see `StopRequestCounter`).
        """
        if self._requests.add():
            self._on_stop_request(repeated=self._requests.count > 1)

    def serve(self, launcher_exit_code: Callable[[], int | None]) -> JobResult:
        """Run the job, and return its result when all supervisors have disconnected, or SHUTDOWN_SECONDS after the job ends.

        Args:
            launcher_exit_code: function that returns the exit code of the launcher, or None while it runs.
        """
        began = keepalive_at = checked_at = time.monotonic()
        while not self._failures:
            self._receive(0.2)
            now = time.monotonic()
            if now - checked_at > LOST_SECONDS / 2:  # this host was suspended
                self.connections.shift_times(now - checked_at)
            checked_at = now
            if now - keepalive_at > KEEPALIVE_SECONDS:
                self.connections.broadcast("keepalive")
                keepalive_at = now
            if self._started_at is None:
                self._start_when_complete(now - began, launcher_exit_code())
            elif launcher_exit_code() is not None and not self._all_exited:
                self._receive_for(GRACE_SECONDS)  # the report of the cause may still be in transit
                if not self._all_exited:
                    description = f"exited with code {launcher_exit_code()} before the ranks did"
                    self._failures.append(Failure("the launcher", description))
            if self.stop_requested and not self._stop_sent:
                self._send_stop()
            self._record(find_lost_ranks(self._running, now))
            if self._started_at is not None:
                self._record(find_stalled_rank(self._running, self._started_at, self.stall_seconds, now))
            if self._started_at is not None and self._all_exited and not self._failures:
                exit_code = max(status.exit_code or 0 for status in self.connections.by_rank.values())
                return self._finish("exit", JobResult(exit_code, stop_requested=self.stop_requested))
        self._receive_for(GRACE_SECONDS)
        cause = root_cause(self._failures)
        if self.report_failure:
            self.print_status(cause.report())
        result = JobResult(exit_code_for(cause), cause, self.stop_requested)
        return self._finish("kill", result, stacks=cause.stalled)

    def close(self) -> None:
        """Close the connections (see `Connections.close`) and stop listening."""
        self.connections.close()

    # Incoming messages

    def _receive(self, timeout: float) -> None:
        for status, message in self.connections.receive(timeout):
            if status is not None:
                self._on_supervisor_message(status, message)
            elif message["kind"] == "launcher exited":
                description = f"exited with code {message['exit_code']} before the ranks did"
                self._failures.append(Failure(f"the launcher on {message['host']}", description))
            elif message["kind"] == "stop requested":
                self._on_stop_request(repeated=message["repeated"])

    def _receive_for(self, seconds: float) -> None:
        """Handle messages for a number of seconds, or until all supervisors have disconnected."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.connections.all_closed:
            self._receive(0.1)

    def _on_supervisor_message(self, status: RankStatus, message: dict[str, Any]) -> None:
        kind, source = message["kind"], str(status)
        if kind == "keepalive" and message["activity"]:
            # Supervisors send the age of the heartbeat instead of its time, because the clocks of the hosts differ.
            status.activity = message["activity"]
            status.heartbeat_at = status.last_message_at - message["heartbeat_age"]
        elif kind == "stop requested":
            self._on_stop_request(repeated=False)
        elif kind == "failed":
            description = message["description"] + status.last_activity
            self._failures.append(Failure(source, description, message["last_lines"], permanent=message["permanent"]))
        elif kind == "exited":
            status.exit_code = int(message["exit_code"])
            if status.exit_code == -signal.SIGTERM and self.stop_requested:
                description = "was stopped on request before it had anything to save"
                self._failures.append(Failure(source, description, stop_requested=True))
            elif status.exit_code not in (0, EXIT_PREEMPTED):
                self._failures.append(
                    failure_from_exit(
                        source, status.exit_code, status.last_activity, message["last_lines"], message["out_of_memory"]
                    )
                )

    def _on_stop_request(self, repeated: bool) -> None:
        self.stop_requested = True
        if repeated:
            self._failures.append(Failure("the launcher", "received a second stop request", permanent=True))

    # State of the ranks

    def _record(self, failure: Failure | None) -> None:
        if failure is not None:
            self._failures.append(failure)

    def _start_when_complete(self, seconds: float, launcher_exit_code: int | None) -> None:
        """Start the ranks once all supervisors are connected.

        A failure is recorded if a supervisor has a wrong world size, if two supervisors have the same rank, if a supervisor did
        not connect in time, or if the launcher exited before all supervisors were connected.

        Args:
            seconds: seconds since the coordinator started.
            launcher_exit_code: exit code of the launcher; None while it runs.
        """
        wrong = find_wrong_rank(self.connections, self.world_size)
        missing = [rank for rank in range(self.world_size) if rank not in self.connections.by_rank]
        if wrong is not None:
            self._failures.append(wrong)
        elif missing:
            address = self.address[0]
            self._record(find_missing_ranks(self.connections, missing, seconds, launcher_exit_code, address))
        else:
            self._started_at = time.monotonic()
            self._start_ranks()

    @property
    def _all_exited(self) -> bool:
        return all(status.exit_code is not None for status in self.connections.by_rank.values())

    @property
    def _running(self) -> list[RankStatus]:
        return [status for _, status in sorted(self.connections.by_rank.items()) if status.exit_code is None]

    # Outgoing messages

    def _start_ranks(self) -> None:
        """Send each supervisor the environment with which its rank joins the others."""
        by_host: dict[tuple[str, str], list[RankStatus]] = {}
        for _, status in sorted(self.connections.by_rank.items()):
            by_host.setdefault((status.host, status.address), []).append(status)
        several_hosts, master = len(by_host) > 1, self.connections.by_rank[0]
        # If rank 0 runs on this host, its supervisor may report a loopback address. Other hosts reach this host at
        # `self.address`.
        master_address = self.address[0] if several_hosts and not master.reachable else master.address
        for statuses in by_host.values():
            for local_rank, status in enumerate(statuses):
                environment = {
                    "RANK": str(status.rank),
                    "WORLD_SIZE": str(self.world_size),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(len(statuses)),
                    "MASTER_ADDR": master_address,
                    "MASTER_PORT": str(master.port),
                }
                # Without this variable, gloo resolves the host's own name, which may map to a loopback address.
                if several_hosts and status.interface and status.reachable:
                    environment["GLOO_SOCKET_IFNAME"] = status.interface
                status.channel.send("start", environment=environment)
        hosts = (
            f"{', '.join(str(status.rank) for status in statuses)} on {host} ({address})"
            for (host, address), statuses in by_host.items()
        )
        self.print_status(f"starting all ranks: {'; '.join(hosts)}")

    def _send_stop(self) -> None:
        self._stop_sent = True
        if self._started_at is None:
            description = "received a stop request before the ranks started"
            self._failures.append(Failure("the launcher", description, stop_requested=True))
        else:
            self.print_status("stop requested: all ranks save and exit; a second request ends them without saving")
            self.connections.broadcast("stop")

    def _finish(self, kind: str, result: JobResult, **fields: Any) -> JobResult:
        """End the supervisors, send the result to the followers, and return the result.

        The call waits until all supervisors have disconnected, for at most SHUTDOWN_SECONDS.

        Args:
            kind: message to the supervisors: "exit", on which a supervisor exits with the exit code of its rank, or "kill", on
                which it kills its rank and exits with 1.
            result: result of the job.
            fields: fields of the message `kind`.
        """
        self.connections.broadcast(kind, **fields)
        self.connections.broadcast("result", **asdict(result))
        self._receive_for(SHUTDOWN_SECONDS)
        return result
