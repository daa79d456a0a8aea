"""Messages between the watch of a job and the supervisors of its ranks: JSON lines over TCP."""

from __future__ import annotations

import json
import socket
from typing import Any

BEAT_SECONDS = 2.0  # between signs of life
LOST_SECONDS = 15.0  # of silence, after which the other end counts as gone


class Link:
    """One end of a connection; never waits.

    Attributes:
        closed: whether the other end has closed it, or it broke.
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
        """The messages that have come.

        Raises:
            ValueError: if the other end does not speak this language.
        """
        try:
            while chunk := self._socket.recv(65536):
                self._in += chunk
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._in = self._in.split(b"\n")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) and "kind" in message for message in messages):
            raise ValueError("not a message")
        return messages

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    @property
    def own_address(self) -> str:
        """This end's IPv4 address."""
        return str(self._socket.getsockname()[0])

    def close(self) -> None:
        """End the connection."""
        self._socket.close()
        self.closed = True
