"""The watch of a job: lets its ranks start together, notices when one of them fails, and has all of them ended at once.

One process of the job serves it (launch.py); the supervisors of all ranks (supervise.py) connect to it.
"""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ldmole_dist.cluster.link import BEAT_SECONDS, LOST_SECONDS, Link
from ldmole_dist.cluster.verdict import Failure, Verdict, failure_of_exit, first_of
from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PREEMPTED

START_SECONDS = 300.0  # for all supervisors to come
GRACE_SECONDS = 2.0  # after a failure, for others to say what they see: the cause may come second
ENDING_SECONDS = 8.0  # for the supervisors to end their ranks


@dataclass
class Member:
    """A rank, as its supervisor describes it."""

    rank: int
    host: str
    address: str
    port: int
    interface: str
    link: Link
    heard: float
    code: int | None = None
    pulse: str = ""
    pulse_time: float | None = None

    @property
    def after(self) -> str:
        """What it was doing, for the end of a sentence."""
        if self.pulse_time is None:
            return ""
        return f" (its last sign of progress, {self.heard - self.pulse_time:.0f} s before: {self.pulse!r})"


class Watch:
    """Serves one attempt at a job.

    Args:
        address: of this host, for the supervisors.
        job: its name; a supervisor of another job is turned away.
        size: number of ranks.
        stall_seconds: without progress of a rank, after which the job counts as stalled.
        tell: shows a line to the user.
        port: to listen at, or 0 to find a free one.

    Attributes:
        address: with the port.
    """

    def __init__(
        self, address: str, job: str, size: int, stall_seconds: float, tell: Callable[[str], None], port: int = 0
    ) -> None:
        self._server = socket.create_server(("", port), backlog=1024)
        self.address = (address, int(self._server.getsockname()[1]))
        self.job, self.size, self.stall_seconds, self.tell = job, size, stall_seconds, tell
        self._members: dict[int, Member] = {}
        self._strangers: list[Link] = []
        self._observers: list[Link] = []
        self._failures: list[Failure] = []
        self._stop_asked = self._stop_told = self._gathered = False

    def request_stop(self) -> None:
        """Have all ranks save and end; asked again, end at once. A signal handler may call it."""
        if self._stop_asked:
            self._failures.append(Failure("the launcher", "asked twice to end", final=True))
        self._stop_asked = True

    def serve(self, launcher_code: Callable[[], int | None]) -> Verdict:
        """Until the job has ended and its supervisors have heard so.

        Args:
            launcher_code: exit code of the process that starts the supervisors, None while it runs.
        """
        started = beaten = looked = time.monotonic()
        while not self._failures:
            self._listen(0.2)
            now = time.monotonic()
            if (
                now - looked > LOST_SECONDS / 2
            ):  # this process did not run (Ctrl-Z, a laptop asleep): nobody could be heard
                for member in self._members.values():
                    member.heard += now - looked
            looked = now
            if now - beaten > BEAT_SECONDS:
                self._tell_all("beat")
                beaten = now
            if not self._gathered:
                self._gather(now - started, launcher_code())
            elif launcher_code() is not None and not self._all_exited():
                self._listen_for(GRACE_SECONDS)  # what ended it may be on its way here
                if not self._all_exited():
                    self._failures.append(
                        Failure("the launcher", f"ended with exit code {launcher_code()} before the ranks did")
                    )
            if self._stop_asked and not self._stop_told:
                self._stop()
            self._check_members(now)
            if self._gathered and self._all_exited() and not self._failures:
                return self._end("release", Verdict(max(m.code or 0 for m in self._members.values())))
        self._listen_for(GRACE_SECONDS)
        first = first_of(self._failures)
        return self._end("end", Verdict(EXIT_EXPLAINED if first.final else 1, first), stacks=first.stalled)

    def close(self) -> None:
        """Stop listening."""
        for link in [*self._strangers, *self._observers, *(member.link for member in self._members.values())]:
            link.close()
        self._server.close()

    # What comes in

    def _listen(self, seconds: float) -> None:
        open_members = [member for member in self._members.values() if not member.link.closed]
        observers = [link for link in self._observers if not link.closed]
        links: list[Any] = [*self._strangers, *observers, *(member.link for member in open_members)]
        readable, _, _ = select.select([self._server, *links], [], [], seconds)
        for link in [link for link in observers if link in readable]:
            self._stop_asked |= bool(link.receive())  # all that they ever say
        for link in [link for link in self._strangers if link in readable]:
            self._greet(link)
        for member in open_members:
            if member.link in readable:
                for message in member.link.receive():
                    member.heard = time.monotonic()
                    self._take(member, message)
        if self._server in readable:
            self._strangers.append(Link(self._server.accept()[0]))

    def _listen_for(self, seconds: float) -> None:
        """So long, or until nobody is connected."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(not member.link.closed for member in self._members.values()):
            self._listen(0.1)

    def _greet(self, link: Link) -> None:
        try:
            messages = link.receive()
        except ValueError:  # a port scanner
            link.close()
            messages = []
        if messages or link.closed:
            self._strangers.remove(link)
        if not messages:
            return
        hello, *others = messages
        kind = hello.pop("kind")
        if kind not in ("hello", "observe") or hello.pop("job", None) != self.job:
            link.close()
            return
        if kind == "observe":
            self._observers.append(link)
            return
        size = hello.pop("size")
        member = Member(link=link, heard=time.monotonic(), **hello)
        if size != self.size or member.rank in self._members:
            how = f"was started as rank {member.rank} of {size}, but the job has {self.size} ranks, each once"
            self._failures.append(Failure(f"a process on {member.host}", how, final=True))
            link.close()
            return
        self._members[member.rank] = member
        for message in others:
            self._take(member, message)

    def _take(self, member: Member, message: dict[str, Any]) -> None:
        who = f"rank {member.rank} on {member.host}"
        if message["kind"] == "beat" and message["pulse"]:
            member.pulse, member.pulse_time = message["pulse"], member.heard - message["age"]
        elif message["kind"] == "asked":
            self._stop_asked = True
        elif message["kind"] == "failed":
            final = bool(message["final"])
            self._failures.append(Failure(who, message["how"] + member.after, message["lines"], final=final))
        elif message["kind"] == "exited":
            member.code, lines = int(message["code"]), message["lines"]
            if member.code == -signal.SIGTERM and self._stop_told:
                self._failures.append(
                    Failure(who, "was asked to end before it had anything to save", lines, final=True)
                )
            elif member.code not in (0, EXIT_PREEMPTED):
                failure = failure_of_exit(who, member.code, member.after, lines, message["out_of_memory"])
                self._failures.append(failure)

    # What is found

    def _gather(self, seconds: float, launcher_code: int | None) -> None:
        missing = [str(rank) for rank in range(self.size) if rank not in self._members]
        if not missing:
            self._gathered = True
            self._go()
        elif launcher_code is not None:
            how = f"ended with exit code {launcher_code} and rank(s) {', '.join(missing)} never started; see its messages above"
            self._failures.append(Failure("the launcher", how))
        elif seconds > START_SECONDS:
            how = f"never started within {START_SECONDS:.0f} s: is the host up, and can it reach {self.address[0]}?"
            self._failures.append(Failure(f"rank(s) {', '.join(missing)}", how))

    def _check_members(self, now: float) -> None:
        running = [member for _, member in sorted(self._members.items()) if member.code is None]
        lost = [member for member in running if member.link.closed or now - member.heard > LOST_SECONDS]
        if lost:
            first = min(lost, key=lambda member: member.heard)
            ranks = [str(member.rank) for member in lost if member.host == first.host]
            silent = f"no sign of life for {LOST_SECONDS:.0f} s: the host cannot be reached, or hangs"
            how = "its supervisor is gone: killed, or the host went down" if first.link.closed else silent
            for member in lost:
                member.link.close()  # nothing more is expected of it; if it lives, it ends its rank now
            self._failures.append(Failure(f"rank(s) {', '.join(ranks)} on {first.host}", how + first.after))
        pulses = [(member.pulse_time, member.rank) for member in running if member.pulse_time is not None]
        oldest, rank = min(pulses, default=(now, 0))
        if now - oldest > self.stall_seconds:
            member = self._members[rank]
            how = f"no progress for {self.stall_seconds:.0f} s, the longest of all, since {member.pulse!r}; stacks are above"
            self._failures.append(Failure(f"rank {rank} on {member.host}", how, stalled=True))

    def _all_exited(self) -> bool:
        return all(member.code is not None for member in self._members.values())

    # What goes out

    def _tell_all(self, kind: str, **fields: Any) -> None:
        for link in [*(member.link for member in self._members.values()), *self._observers]:
            if not link.closed:
                link.send(kind, **fields)

    def _go(self) -> None:
        """Let the ranks start, each knowing the others."""
        master = self._members[0]
        of_host: dict[tuple[str, str], list[int]] = {}
        for rank in range(self.size):
            member = self._members[rank]
            of_host.setdefault((member.host, member.address), []).append(rank)
        for ranks in of_host.values():
            for local_rank, rank in enumerate(ranks):
                member = self._members[rank]
                environment = {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(self.size),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(len(ranks)),
                    "MASTER_ADDR": master.address,
                    "MASTER_PORT": str(master.port),
                }
                if len(of_host) > 1 and member.interface:
                    environment |= {"GLOO_SOCKET_IFNAME": member.interface, "NCCL_SOCKET_IFNAME": member.interface}
                member.link.send("go", environment=environment)
        self.tell(
            "all ranks start: "
            + "; ".join(
                f"{', '.join(map(str, ranks))} on {host} ({address})" for (host, address), ranks in of_host.items()
            )
        )

    def _stop(self) -> None:
        self._stop_told = True
        if self._gathered:
            self.tell("asked to end: all ranks save and end; asked again, they end without")
            self._tell_all("stop")
        else:
            self._failures.append(Failure("the launcher", "asked to end before the ranks had started", final=True))

    def _end(self, kind: str, verdict: Verdict, **fields: Any) -> Verdict:
        self._tell_all(kind, **fields)
        for observer in self._observers:
            observer.send("verdict", **asdict(verdict))
        self._listen_for(ENDING_SECONDS)
        return verdict
