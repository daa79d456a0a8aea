"""Messages between the coordinator of a job and its supervisors and followers: JSON lines over TCP."""

from __future__ import annotations

import json
import resource
import select
import socket
from collections.abc import Iterable
from typing import Any

KEEPALIVE_SECONDS = 2.0  # interval of keepalive messages, in both directions
LOST_SECONDS = 15.0  # time without a message after which the peer is treated as lost
_MAX_MESSAGE_BYTES = 2**20


class Channel:
    """One end of a TCP connection that carries messages; no method blocks.

    Args:
        sock: connected socket; the channel takes ownership of it.

    Attributes:
        closed: whether either end closed the connection, the connection broke, or the peer sent something that is not a
            message, or a message of more than 1 MiB.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closed = False
        self._socket, self._received, self._unsent = sock, b"", b""

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message; bytes that the socket cannot take now are sent with the next message."""
        self._unsent += json.dumps({"kind": kind, **fields}).encode() + b"\n"
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def receive(self) -> list[dict[str, Any]]:
        """Read at most 64 KiB, and return the messages that have arrived completely.

        If the peer has closed the connection or sent invalid data, `closed` is set; after invalid data, the list is empty.
        """
        try:
            chunk = self._socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            chunk = b""
        *lines, self._received = (self._received + chunk).split(b"\n")
        # The port is open to the network: a port scanner or another program may send anything.
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            messages = [None]
        if not all(isinstance(message, dict) and isinstance(message.get("kind"), str) for message in messages):
            messages, chunk = [], b""
        self.closed = self.closed or not chunk or len(self._received) > _MAX_MESSAGE_BYTES
        return messages

    def fileno(self) -> int:
        """Return the file descriptor of the socket."""
        return self._socket.fileno()

    @property
    def local_address(self) -> str:
        """IPv4 address of this end."""
        return str(self._socket.getsockname()[0])

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
        self.closed = True


def raise_open_file_limit() -> None:
    """Raise the limit on open files and sockets of this process and of its future children to the hard limit."""
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def wait_readable(sources: Iterable[Any], timeout: float) -> set[Any]:
    """Wait until at least one source is readable, and return all readable sources; the set is empty after a timeout.

    A connection that the peer has closed is readable.

    Args:
        sources: file descriptors or objects with a `fileno` method.
        timeout: maximum number of seconds to wait.
    """
    # poll instead of select.select, which fails for file descriptors above 1023.
    poll, by_fd = select.poll(), {}
    for source in sources:
        fd = source if isinstance(source, int) else source.fileno()
        by_fd[fd] = source
        poll.register(fd, select.POLLIN)
    return {by_fd[fd] for fd, _ in poll.poll(timeout * 1000)}
