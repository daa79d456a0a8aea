"""Connections to the coordinator of a job: from the supervisor of each rank, and from followers on other hosts."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import Any

from ldmole_dist.cluster.messages import Channel, raise_open_file_limit, wait_readable
from ldmole_dist.errors import UserError

HELLO_SECONDS = 10.0  # time for a new connection to send its first message


@dataclass
class RankStatus:
    """State of one rank, as its supervisor reports it to the coordinator.

    All times are readings of `time.monotonic`.

    Attributes:
        rank: global rank.
        world_size: number of ranks of the job, according to the launcher that started the supervisor.
        host: name of the host.
        address: IPv4 address at which the other ranks reach the host.
        port: free TCP port on the host; the ranks rendezvous at the port of rank 0.
        interface: network interface that has the address; "" if unknown.
        channel: connection to the supervisor.
        connected_at: time at which the supervisor connected.
        last_message_at: time of the last message from the supervisor.
        exit_code: exit code of the rank as `subprocess` reports it; None until the supervisor has reported the exit.
        activity: text of the rank's last heartbeat; "" before the first one.
        heartbeat_at: time of the rank's last heartbeat; None before the first one.
    """

    rank: int
    world_size: int
    host: str
    address: str
    port: int
    interface: str
    channel: Channel
    connected_at: float = field(default_factory=time.monotonic)
    last_message_at: float = field(default_factory=time.monotonic)
    exit_code: int | None = None
    activity: str = ""
    heartbeat_at: float | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def reachable(self) -> bool:
        """Whether other hosts can reach the address.

        A loopback address is not reachable. A supervisor reports such an address if it connects to the coordinator through the
        loopback interface: in a job on one host, or if /etc/hosts maps the host's own name to 127.0.1.1 (Debian).
        """
        return not self.address.startswith("127.")

    @property
    def last_activity(self) -> str:
        """The last heartbeat in parentheses, to append to an error message; "" before the first heartbeat."""
        if self.heartbeat_at is None:
            return ""
        return f" (last heartbeat {self.last_message_at - self.heartbeat_at:.0f} s earlier: {self.activity!r})"


class Connections:
    """Server that accepts the connections of one job.

    Args:
        address: IPv4 address or name of this host; an address 127.* restricts the server to this host.
        job: name of the job; connections that name another job are rejected.
        port: TCP port to listen on; 0 selects a free one.

    Attributes:
        port: TCP port on which the server listens.
        by_rank: status of each rank whose supervisor has connected, including those whose connection is closed.
        duplicates: status of each supervisor that connected with a rank that is already in `by_rank`.

    Raises:
        UserError: if the server cannot listen on the port.
    """

    def __init__(self, address: str, job: str, port: int) -> None:
        try:
            self._server = socket.create_server((address if address.startswith("127.") else "", port), backlog=1024)
        except OSError as error:
            raise UserError(
                f"cannot listen on port {port} of this host: {error.strerror}; set another --port on all hosts "
                "(PORT and PORT + 1 must be free)"
            ) from error
        raise_open_file_limit()
        self.port = int(self._server.getsockname()[1])
        self.by_rank: dict[int, RankStatus] = {}
        self.duplicates: list[RankStatus] = []
        self._job = job
        self._unidentified: dict[Channel, float] = {}
        self._followers: list[Channel] = []

    def receive(self, timeout: float) -> list[tuple[RankStatus | None, dict[str, Any]]]:
        """Return the messages that have arrived, and accept a new connection if there is one.

        The first message of a connection identifies its sender and is not returned. A connection without a first message within
        HELLO_SECONDS is closed.

        Args:
            timeout: maximum number of seconds to wait for a message or a new connection.

        Returns:
            Pairs (status, message); status is that of the rank whose supervisor sent the message, or None for a follower.
        """
        open_ranks = [status for status in self.by_rank.values() if not status.channel.closed]
        followers = [channel for channel in self._followers if not channel.closed]
        channels = [*self._unidentified, *followers, *(status.channel for status in open_ranks)]
        ready = wait_readable([self._server, *channels], timeout)
        messages: list[tuple[RankStatus | None, dict[str, Any]]] = []
        for channel, since in list(self._unidentified.items()):
            if channel in ready:
                messages += self._identify(channel)
            elif time.monotonic() - since > HELLO_SECONDS:
                self._reject(channel)
        for channel in followers:
            if channel in ready:
                messages += [(None, message) for message in channel.receive()]
        for status in open_ranks:
            if status.channel in ready:
                for message in status.channel.receive():
                    status.last_message_at = time.monotonic()
                    messages.append((status, message))
        if self._server in ready:
            self._unidentified[Channel(self._server.accept()[0])] = time.monotonic()
        return messages

    @property
    def all_closed(self) -> bool:
        """Whether the connections to all supervisors in `by_rank` are closed."""
        return all(status.channel.closed for status in self.by_rank.values())

    def broadcast(self, kind: str, **fields: Any) -> None:
        """Send a message to all supervisors in `by_rank` and all followers that are still connected."""
        for channel in [*(status.channel for status in self.by_rank.values()), *self._followers]:
            if not channel.closed:
                channel.send(kind, **fields)

    def shift_times(self, seconds: float) -> None:
        """Add the length of a suspension of this process to the times of the last message and heartbeat of each rank.

        A suspended process receives no messages, so the ranks would otherwise be treated as lost or stalled.

        Args:
            seconds: length of the suspension.
        """
        for status in self.by_rank.values():
            status.last_message_at += seconds
            if status.heartbeat_at is not None:
                status.heartbeat_at += seconds

    def close(self) -> None:
        """Close all connections except those of `duplicates`, and stop listening."""
        for channel in [*self._unidentified, *self._followers, *(status.channel for status in self.by_rank.values())]:
            channel.close()
        self._server.close()

    def _identify(self, channel: Channel) -> list[tuple[RankStatus | None, dict[str, Any]]]:
        """Register a connection by its first message, and return the messages that arrived after the first one.

        A connection whose first message is invalid, or belongs to another job, is closed. A supervisor whose rank is already in
        `by_rank` is added to `duplicates`, and its messages are dropped.
        """
        messages = channel.receive()
        if not messages and not channel.closed:
            return []
        hello, *others = messages or [{"kind": "nothing"}]
        kind = hello.pop("kind")
        if hello.pop("job", None) != self._job:
            self._reject(channel)
            return []
        if kind == "follow":
            del self._unidentified[channel]
            self._followers.append(channel)
            channel.send("keepalive")
            return [(None, message) for message in others]
        try:
            status = RankStatus(channel=channel, **hello)
        except TypeError:  # a supervisor of another version of this package sends other fields
            self._reject(channel)
            return []
        del self._unidentified[channel]
        if status.rank in self.by_rank:
            self.duplicates.append(status)
            return []
        self.by_rank[status.rank] = status
        return [(status, message) for message in others]

    def _reject(self, channel: Channel) -> None:
        del self._unidentified[channel]
        channel.close()
