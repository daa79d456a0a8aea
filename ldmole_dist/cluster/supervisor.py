"""Supervisor of one rank: starts the rank when all ranks can start, and kills it when any rank of the job has failed.

A launcher starts one supervisor per rank, in place of the rank. The supervisor connects to the coordinator of the job
(coordinator.py), reports the state of its rank, and executes the commands of the coordinator. It imports neither torch nor
DeepSpeed, to leave the memory of the host to the ranks.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from ldmole_dist.cluster.messages import KEEPALIVE_SECONDS, LOST_SECONDS, Channel, raise_open_file_limit, wait_readable
from ldmole_dist.cluster.network import interfaces
from ldmole_dist.cluster.output import print_status
from ldmole_dist.cluster.rank_environment import RankEnvironment
from ldmole_dist.cluster.rank_process import RankProcess, adopt_orphans, count_oom_kills

# Time that a rank may be stopped (SIGSTOP) before it is treated as failed; a debugger stops a process briefly.
SUSPENDED_SECONDS = 10.0
# Variables that torchrun sets and that the ranks must not inherit. TORCHELASTIC_USE_AGENT_STORE: with it, rank 0 would not
# create the store at MASTER_PORT. OMP_NUM_THREADS: torchrun sets 1; a value that the user set is in `exports`.
_TORCHRUN_VARIABLES = ("TORCHELASTIC_USE_AGENT_STORE", "OMP_NUM_THREADS")


class Supervisor:
    """Supervisor of one rank.

    Args:
        rank_environment: rank and world size.
        command: command of the rank.
        exports: environment variables for the rank.
        job: name of the job; the coordinator rejects other names.
        interface: network interface to use; None selects the one that leads to the coordinator.
    """

    def __init__(
        self,
        rank_environment: RankEnvironment,
        command: Sequence[str],
        exports: Mapping[str, str],
        job: str,
        interface: str | None,
    ) -> None:
        self.rank, self.world_size = rank_environment.rank, rank_environment.world_size
        self.command, self.exports, self.job, self.interface = command, exports, job, interface
        self._process: RankProcess | None = None
        self._output_is_remote = True
        self._reported = self._stop_signalled = False
        self._parent = os.getppid()
        self._suspended_since: float | None = None
        self._oom_kills = count_oom_kills()

    def run(self, coordinator: tuple[str, int], timeout: float = 120.0) -> int:
        """Supervise the rank until the coordinator ends the job.

        Args:
            coordinator: IPv4 address or host name, and port of the coordinator.
            timeout: maximum number of seconds to wait for a connection.

        Returns:
            The exit code of the rank; 1 if the job failed, or if the coordinator does not answer or is lost.
        """
        channel = _connect(coordinator, timeout)
        if channel is None:
            at = f"{coordinator[0]}:{coordinator[1]}"
            print_status(f"rank {self.rank}: the coordinator at {at} does not answer; open all ports between the hosts")
            return 1
        # If `ldmole launch` runs on the same host, it handles the loss of the terminal itself.
        self._output_is_remote = not coordinator[0].startswith("127.") and "TORCHELASTIC_RUN_ID" not in os.environ
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP; leave it ignored
                signal.signal(number, self._on_signal)
        self._send_hello(channel)
        try:
            return self._serve(channel)
        finally:
            if self._process is not None:
                self._process.kill()
            channel.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_signalled = True

    def _send_hello(self, channel: Channel) -> None:
        with socket.socket() as s:  # select a free port; the ranks rendezvous at the port of rank 0
            s.bind(("", 0))
            port = s.getsockname()[1]
        known = interfaces()
        address = known.get(self.interface or "", channel.local_address)
        name = self.interface or next((name for name, own in known.items() if own == address), "")
        location = {"host": socket.gethostname(), "address": address, "port": port, "interface": name}
        channel.send("hello", job=self.job, rank=self.rank, world_size=self.world_size, **location)
        if self.interface is not None and self.interface not in known:
            listed = ", ".join(f"{name} ({own})" for name, own in known.items())
            description = (
                f"has no network interface {self.interface!r} with an IPv4 address, only {listed}; correct --interface"
            )
            self._report_failure(channel, description, permanent=True)

    def _serve(self, channel: Channel) -> int:
        """Exchange messages with the coordinator until the job has ended, and return the exit code."""
        last_message_at = sent_at = checked_at = time.monotonic()
        while True:
            process = self._process
            ready = wait_readable([channel] if process is None else [channel, process.heartbeat_fd], 0.2)
            now = time.monotonic()
            if now - checked_at > LOST_SECONDS / 2:  # the host was suspended: extend the timeouts
                last_message_at = now
                if process is not None:
                    process.heartbeat_at += now - checked_at
            checked_at = now
            for message in channel.receive() if channel in ready else ():
                last_message_at = now
                exit_code = self._handle(channel, message)
                if exit_code is not None:
                    return exit_code
            if channel.closed or now - last_message_at > LOST_SECONDS:
                if not self._reported:
                    host = socket.gethostname()
                    print_status(
                        f"rank {self.rank} on {host}: killed, because the connection to the coordinator was lost"
                    )
                return 1
            if self._stop_signalled:
                # A launcher signals ranks one by one; the coordinator stops all of them at once.
                self._stop_signalled = False
                channel.send("stop requested")
            if process is not None and process.heartbeat_fd in ready:
                process.read_heartbeats(now)
            if now - sent_at > KEEPALIVE_SECONDS:
                activity = "" if process is None else process.activity
                heartbeat_age = 0.0 if process is None else now - process.heartbeat_at
                channel.send("keepalive", activity=activity, heartbeat_age=heartbeat_age)
                sent_at = now
            if not self._reported:
                self._check_rank(channel, now)

    def _handle(self, channel: Channel, message: Mapping[str, Any]) -> int | None:
        """Execute a command of the coordinator; return the exit code if the command ends this supervisor, otherwise None."""
        process = self._process
        if message["kind"] == "start":
            self._start_rank(channel, message["environment"])
        elif message["kind"] == "stop" and process is not None:
            process.terminate()
        elif message["kind"] == "exit":
            return 1 if process is None or process.exit_code is None else process.exit_code
        elif message["kind"] == "kill":
            if process is not None and message["stacks"]:
                process.print_stacks()
            return 1  # `run` kills the rank
        return None

    def _start_rank(self, channel: Channel, environment: dict[str, str]) -> None:
        skipped = _TORCHRUN_VARIABLES if "TORCHELASTIC_RUN_ID" in os.environ else ()
        own = {name: value for name, value in os.environ.items() if name not in skipped}
        if self.interface is not None:
            environment["NCCL_SOCKET_IFNAME"] = self.interface
        elif "GLOO_SOCKET_IFNAME" in own:  # a value that is set on this host takes precedence
            environment.pop("GLOO_SOCKET_IFNAME", None)
        raise_open_file_limit()  # each rank of a large job has a connection to every other rank
        try:
            self._process = RankProcess(self.command, own | environment | dict(self.exports))
        except OSError as error:
            self._report_failure(channel, f"cannot be started: {error}", permanent=True)

    def _check_rank(self, channel: Channel, now: float) -> None:
        """Report to the coordinator if the rank has exited or was suspended for too long, or if the launcher is gone.

        The launcher is gone if the parent process has exited or, with `_output_is_remote`, if the reader of the output is gone.
        """
        process = self._process
        if process is not None and process.exit_code is not None:
            process.kill()  # kill descendants that outlived the rank
            channel.send(
                "exited",
                exit_code=process.exit_code,
                last_lines=process.last_lines(),
                out_of_memory=count_oom_kills() > self._oom_kills,
            )
            self._reported = True
        elif os.getppid() != self._parent or (self._output_is_remote and self._output_closed):
            description = "lost the launcher's connection to this host (the launcher or the ssh session ended)"
            self._report_failure(channel, description)
        elif process is not None and process.suspended:
            self._suspended_since = self._suspended_since or now
            if now - self._suspended_since > SUSPENDED_SECONDS:
                self._report_failure(channel, f"was stopped by a signal (SIGSTOP) for {SUSPENDED_SECONDS:.0f} s")
        else:
            self._suspended_since = None

    @property
    def _output_closed(self) -> bool:
        """Whether the reader of this process's output is gone."""
        poll = select.poll()
        poll.register(1, 0)
        closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
        return closed or (self._process is not None and self._process.output_broken)

    def _report_failure(self, channel: Channel, description: str, permanent: bool = False) -> None:
        last_lines = [] if self._process is None else self._process.last_lines()
        channel.send("failed", description=description, last_lines=last_lines, permanent=permanent)
        self._reported = True


def _connect(address: tuple[str, int], timeout: float) -> Channel | None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            return Channel(socket.create_connection(address, timeout=5))
        except OSError:
            time.sleep(0.5)
    return None
