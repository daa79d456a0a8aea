"""Messages between the watch of a job and the supervisors of its ranks: JSON lines over TCP."""

from __future__ import annotations

import json
import resource
import select
import socket
from collections.abc import Iterable
from typing import Any

BEAT_SECONDS = 2.0  # between signs of life
LOST_SECONDS = 15.0  # of silence, after which the other end counts as gone
_LONGEST = 2**20  # bytes of a message


class Link:
    """One end of a connection; never waits.

    Attributes:
        closed: whether the other end has closed it, it broke, or what came was no message.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closed = False
        self._socket, self._in, self._out = sock, b"", b""

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message; what the network does not take now goes with the next one."""
        self._out += json.dumps({"kind": kind, **fields}).encode() + b"\n"
        try:
            self._out = self._out[self._socket.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come whole."""
        try:
            chunk = self._socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            chunk = b""
        *lines, self._in = (self._in + chunk).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # a port scanner
            messages = [None]
        if not all(isinstance(message, dict) and isinstance(message.get("kind"), str) for message in messages):
            messages, chunk = [], b""
        self.closed = self.closed or not chunk or len(self._in) > _LONGEST
        return messages

    def fileno(self) -> int:
        """For `readable`."""
        return self._socket.fileno()

    @property
    def own_address(self) -> str:
        """This end's IPv4 address."""
        return str(self._socket.getsockname()[0])

    def close(self) -> None:
        """End the connection."""
        self._socket.close()
        self.closed = True


def allow_many_files() -> None:
    """Let this process, and those that it starts, have as many files and connections open as the host permits."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def readable(sources: Iterable[Any], seconds: float) -> set[Any]:
    """Those of some sockets, links and file descriptors that can be read, after waiting so long for one."""
    poll, by_number = select.poll(), {}  # not select, which knows no number above 1023
    for source in sources:
        number = source if isinstance(source, int) else source.fileno()
        by_number[number] = source
        poll.register(number, select.POLLIN)
    return {by_number[number] for number, _ in poll.poll(seconds * 1000)}
