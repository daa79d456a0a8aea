"""The watch of a job: lets its ranks start together, notices when one of them fails, and has all of them ended at once.

One process of the job serves it (launch.py); the supervisors of all ranks (supervise.py) connect to it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ldmole_dist.cluster.connections import Member, Members
from ldmole_dist.cluster.messages import BEAT_SECONDS, LOST_SECONDS
from ldmole_dist.cluster.verdict import Failure, Verdict, code_of, failure_of_exit, first_of
from ldmole_dist.errors import EXIT_PREEMPTED

START_SECONDS = 300.0  # for the first supervisor to come
LATE_SECONDS = 120.0  # for each further one: some hosts are slower than others, but not by so much
LOADING_SECONDS = 3600.0  # for a rank to load its model and begin
GRACE_SECONDS = 2.0  # after a failure, for others to say what they see: the cause may come second
ENDING_SECONDS = 8.0  # for the supervisors to end their ranks
TOGETHER_SECONDS = 1.0  # within which signals to this process are one


class StopRequests:
    """Counts being asked to end. One event often brings several signals (a terminal that closes, a scheduler that signals a
    whole job), which are one request.

    Attributes:
        number: of requests.
    """

    def __init__(self) -> None:
        self.number, self._last = 0, -TOGETHER_SECONDS

    def counts(self) -> bool:
        """Take note of a signal; whether it is a request of its own."""
        now = time.monotonic()
        if now - self._last <= TOGETHER_SECONDS:
            return False
        self.number, self._last = self.number + 1, now
        return True


class Watch:
    """Serves one attempt at a job.

    Args:
        address: of this host, for the supervisors.
        job: its name.
        size: number of ranks.
        stall_seconds: without progress of a rank, after which the job counts as stalled.
        tell: shows a line to the user.
        port: to listen at, or 0 to find a free one.
        early: tell of a failure before all has ended, rather than leave that to the caller.

    Attributes:
        address: with the port.
        stop_requested: whether anybody asked for the end.

    Raises:
        UserError: where the port is taken.
    """

    def __init__(
        self,
        address: str,
        job: str,
        size: int,
        stall_seconds: float,
        tell: Callable[[str], None],
        port: int = 0,
        early: bool = False,
    ) -> None:
        self.members = Members(address, job, port)
        self.address = (address, self.members.port)
        self.job, self.size, self.stall_seconds, self.tell, self.early = job, size, stall_seconds, tell, early
        self.stop_requested = False
        self._requests, self._failures = StopRequests(), list[Failure]()
        self._stop_told = False
        self._gathered: float | None = None

    def request_stop(self) -> None:
        """Have all ranks save and end; asked again, end at once. A signal handler may call it."""
        if self._requests.counts():
            self._ask(again=self._requests.number > 1)

    def serve(self, launcher_code: Callable[[], int | None]) -> Verdict:
        """Until the job has ended and its supervisors have heard so.

        Args:
            launcher_code: exit code of the process that starts the supervisors, None while it runs.
        """
        started = beaten = looked = time.monotonic()
        while not self._failures:
            self._listen(0.2)
            now = time.monotonic()
            if now - looked > LOST_SECONDS / 2:
                self.members.slept(now - looked)
            looked = now
            if now - beaten > BEAT_SECONDS:
                self.members.tell("beat")
                beaten = now
            if self._gathered is None:
                self._gather(now - started, launcher_code())
            elif launcher_code() is not None and not self._all_exited:
                self._listen_for(GRACE_SECONDS)  # what ended it may be on its way here
                if not self._all_exited:
                    how = f"ended with exit code {launcher_code()} before the ranks did"
                    self._failures.append(Failure("the launcher", how))
            if self.stop_requested and not self._stop_told:
                self._stop()
            self._check_lost(now)
            self._check_stalled(now)
            if self._gathered is not None and self._all_exited and not self._failures:
                code = max(member.code or 0 for member in self.members.of_rank.values())
                return self._end("release", Verdict(code, stopped=self.stop_requested))
        self._listen_for(GRACE_SECONDS)
        first = first_of(self._failures)
        if self.early:
            self.tell(first.text())
        return self._end("end", Verdict(code_of(first), first, self.stop_requested), stacks=first.stalled)

    def close(self) -> None:
        """Stop listening."""
        self.members.close()

    # What comes in

    def _listen(self, seconds: float) -> None:
        for member, message in self.members.listen(seconds):
            if member is not None:
                self._take(member, message)
            elif message["kind"] == "launcher ended":
                how = f"ended with exit code {message['code']} before the ranks did"
                self._failures.append(Failure(f"the launcher on {message['host']}", how))
            elif message["kind"] in ("asked", "asked twice"):
                self._ask(again=message["kind"] == "asked twice")

    def _listen_for(self, seconds: float) -> None:
        """So long, or until nobody is connected."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.members.all_gone:
            self._listen(0.1)

    def _take(self, member: Member, message: dict[str, Any]) -> None:
        kind, who = message["kind"], str(member)
        if kind == "beat" and message["pulse"]:
            member.pulse, member.pulse_time = message["pulse"], member.heard - message["age"]
        elif kind == "asked":
            self._ask(again=False)
        elif kind == "failed":
            how = message["how"] + member.after
            self._failures.append(Failure(who, how, message["lines"], final=message["final"]))
        elif kind == "exited":
            member.code, lines = int(message["code"]), message["lines"]
            if member.code == -signal.SIGTERM and self.stop_requested:
                self._failures.append(Failure(who, "was asked to end before it had anything to save", asked=True))
            elif member.code not in (0, EXIT_PREEMPTED):
                out_of_memory = message["out_of_memory"]
                self._failures.append(failure_of_exit(who, member.code, member.after, lines, out_of_memory))

    def _ask(self, again: bool) -> None:
        self.stop_requested = True
        if again:
            self._failures.append(Failure("the launcher", "asked twice to end", final=True))

    # What is found

    def _gather(self, seconds: float, launcher_code: int | None) -> None:
        members = self.members.of_rank
        waited = min([seconds, *(time.monotonic() - member.came for member in members.values())])
        patience = LATE_SECONDS if members else START_SECONDS
        for member in [*members.values(), *self.members.twice]:
            if member.size != self.size or member in self.members.twice:
                how = (
                    f"was started as rank {member.rank} of {member.size}, but the job has {self.size} ranks, each once"
                )
                self._failures.append(Failure(f"a process on {member.host}", how, final=True))
                return
        missing = ", ".join(str(rank) for rank in range(self.size) if rank not in members)
        if not missing:
            self._gathered = time.monotonic()
            self._go()
        elif launcher_code is not None:
            how = f"ended with exit code {launcher_code} and rank(s) {missing} never started; see its messages above"
            self._failures.append(Failure("the launcher", how))
        elif waited > patience:
            how = f"did not start: for {patience:.0f} s none has; is the host up, and can it reach {self.address[0]}?"
            self._failures.append(Failure(f"rank(s) {missing}", how))

    @property
    def _all_exited(self) -> bool:
        return all(member.code is not None for member in self.members.of_rank.values())

    @property
    def _running(self) -> list[Member]:
        return [member for _, member in sorted(self.members.of_rank.items()) if member.code is None]

    def _check_lost(self, now: float) -> None:
        lost = [member for member in self._running if member.link.closed or now - member.heard > LOST_SECONDS]
        if not lost:
            return
        first = min(lost, key=lambda member: member.heard)
        how = "its supervisor is gone: killed, or the host went down"
        if not first.link.closed:
            how = f"no sign of life for {LOST_SECONDS:.0f} s: the host cannot be reached, or hangs"
            # Its other ranks were last heard at about the same time.
            late = LOST_SECONDS - 2 * BEAT_SECONDS
            lost = [member for member in self._running if member.host == first.host and now - member.heard > late]
        for member in lost:
            member.link.close()  # nothing more is expected of it; if it lives, it ends its rank now
        ranks = ", ".join(str(member.rank) for member in lost if member.host == first.host)
        self._failures.append(Failure(f"rank(s) {ranks} on {first.host}", how + first.after, sudden=True))

    def _check_stalled(self, now: float) -> None:
        if self._gathered is None:
            return
        for member in self._running:
            if member.pulse_time is None and now - self._gathered > LOADING_SECONDS:
                how = f"has not begun to train within {LOADING_SECONDS:.0f} s; stacks are above"
                self._failures.append(Failure(str(member), how, stalled=True))
        pulses = [(member.pulse_time, member.rank) for member in self._running if member.pulse_time is not None]
        oldest, rank = min(pulses, default=(now, 0))
        if now - oldest > self.stall_seconds:
            member = self.members.of_rank[rank]
            how = f"no progress for {self.stall_seconds:.0f} s, the longest of all, since {member.pulse!r}; stacks are above"
            self._failures.append(Failure(str(member), how, stalled=True))

    # What goes out

    def _go(self) -> None:
        """Let the ranks start, each knowing the others."""
        of_host: dict[tuple[str, str], list[Member]] = {}
        for _, member in sorted(self.members.of_rank.items()):
            of_host.setdefault((member.host, member.address), []).append(member)
        apart, master = len(of_host) > 1, self.members.of_rank[0]
        for members in of_host.values():
            for local_rank, member in enumerate(members):
                environment = {
                    "RANK": str(member.rank),
                    "WORLD_SIZE": str(self.size),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(len(members)),
                    "MASTER_ADDR": self.address[0] if apart and not master.reachable else master.address,
                    "MASTER_PORT": str(master.port),
                }
                if apart and member.interface and member.reachable:
                    environment["GLOO_SOCKET_IFNAME"] = member.interface
                member.link.send("go", environment=environment)
        hosts = (
            f"{', '.join(str(member.rank) for member in members)} on {host} ({address})"
            for (host, address), members in of_host.items()
        )
        self.tell(f"all ranks start: {'; '.join(hosts)}")

    def _stop(self) -> None:
        self._stop_told = True
        if self._gathered is not None:
            self.tell("asked to end: all ranks save and end; asked again, they end without")
            self.members.tell("stop")
        else:
            self._failures.append(Failure("the launcher", "asked to end before the ranks had started", asked=True))

    def _end(self, kind: str, verdict: Verdict, **fields: Any) -> Verdict:
        self.members.tell(kind, **fields)
        self.members.tell("verdict", **asdict(verdict))
        self._listen_for(ENDING_SECONDS)
        return verdict
