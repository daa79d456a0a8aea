"""Who is connected to the watch of a job: a supervisor for each rank, and observers on other hosts."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import Any

from ldmole_dist.cluster.messages import Link, allow_many_files, readable
from ldmole_dist.errors import UserError

GREETING_SECONDS = 10.0  # for a new connection to say who it is


@dataclass
class Member:
    """A rank, as its supervisor describes it.

    Attributes:
        rank: number.
        size: number of ranks, as whoever started it says.
        host: name.
        address: where the other ranks reach it.
        port: that was free there.
        interface: of the network with that address; "" if unknown.
        link: to its supervisor.
        came: when it was made; a time of `time.monotonic`, as all here.
        heard: when something last came from there.
        code: exit code, once it has ended.
        pulse: what it said last that it was doing, and
        pulse_time: when; None before the first time.
    """

    rank: int
    size: int
    host: str
    address: str
    port: int
    interface: str
    link: Link
    came: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    code: int | None = None
    pulse: str = ""
    pulse_time: float | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def reachable(self) -> bool:
        """From other hosts: not where its own name leads a host to itself, as Debian's /etc/hosts does."""
        return not self.address.startswith("127.")

    @property
    def after(self) -> str:
        """What it was doing, for the end of a sentence."""
        if self.pulse_time is None:
            return ""
        return f" (its last sign of progress, {self.heard - self.pulse_time:.0f} s before: {self.pulse!r})"


class Members:
    """Listens.

    Args:
        address: of this host.
        job: name of the job; a supervisor of another is turned away.
        port: to listen at, or 0 to find a free one.

    Attributes:
        of_rank: those whose rank is taken.
        twice: those whose rank was taken already.

    Raises:
        UserError: where the port is taken.
    """

    def __init__(self, address: str, job: str, port: int) -> None:
        try:
            self._server = socket.create_server((address if address.startswith("127.") else "", port), backlog=1024)
        except OSError as error:
            raise UserError(f"port {port} of this host: {error.strerror}; choose another with --port") from error
        allow_many_files()
        self.port = int(self._server.getsockname()[1])
        self.of_rank: dict[int, Member] = {}
        self.twice: list[Member] = []
        self._job = job
        self._strangers: dict[Link, float] = {}
        self._observers: list[Link] = []

    def listen(self, seconds: float) -> list[tuple[Member | None, dict[str, Any]]]:
        """What comes within some seconds at most, from members and, as None, from observers."""
        members = [member for member in self.of_rank.values() if not member.link.closed]
        observers = [link for link in self._observers if not link.closed]
        links = [*self._strangers, *observers, *(member.link for member in members)]
        ready = readable([self._server, *links], seconds)
        messages: list[tuple[Member | None, dict[str, Any]]] = []
        for link, since in list(self._strangers.items()):
            if link in ready:
                messages += self._greet(link)
            elif time.monotonic() - since > GREETING_SECONDS:
                self._turn_away(link)
        for link in observers:
            if link in ready:
                messages += [(None, message) for message in link.receive()]
        for member in members:
            if member.link in ready:
                for message in member.link.receive():
                    member.heard = time.monotonic()
                    messages.append((member, message))
        if self._server in ready:
            self._strangers[Link(self._server.accept()[0])] = time.monotonic()
        return messages

    @property
    def all_gone(self) -> bool:
        """Whether nobody is connected any more."""
        return all(member.link.closed for member in self.of_rank.values())

    def tell(self, kind: str, **fields: Any) -> None:
        """Send a message to all members and observers."""
        for link in [*(member.link for member in self.of_rank.values()), *self._observers]:
            if not link.closed:
                link.send(kind, **fields)

    def slept(self, seconds: float) -> None:
        """This process did not run for so long, because its host was suspended: nobody could be heard."""
        for member in self.of_rank.values():
            member.heard += seconds
            if member.pulse_time is not None:
                member.pulse_time += seconds

    def close(self) -> None:
        """End all connections, and stop listening."""
        for link in [*self._strangers, *self._observers, *(member.link for member in self.of_rank.values())]:
            link.close()
        self._server.close()

    def _greet(self, link: Link) -> list[tuple[Member | None, dict[str, Any]]]:
        messages = link.receive()
        if not messages and not link.closed:
            return []
        hello, *others = messages or [{"kind": "nothing"}]
        kind = hello.pop("kind")
        if hello.pop("job", None) != self._job:
            self._turn_away(link)
            return []
        if kind == "observe":
            del self._strangers[link]
            self._observers.append(link)
            link.send("beat")
            return [(None, message) for message in others]
        try:
            member = Member(link=link, **hello)
        except TypeError:  # of another version of this package
            self._turn_away(link)
            return []
        del self._strangers[link]
        if member.rank in self.of_rank:
            self.twice.append(member)
            return []
        self.of_rank[member.rank] = member
        return [(member, message) for message in others]

    def _turn_away(self, link: Link) -> None:
        del self._strangers[link]
        link.close()
