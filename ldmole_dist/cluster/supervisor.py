"""The supervisor of one rank: starts it when all ranks can start, ends it when any rank of the job has failed.

Every launcher starts supervisors in the place of ranks. Each is connected to the job's watch (watch.py), reports how its
rank is doing, and does what the watch says to all at once. It imports neither torch nor DeepSpeed: it must not cost a host its
memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

import psutil

from ldmole_dist.cluster.heartbeat import HEARTBEAT_FD
from ldmole_dist.cluster.messages import BEAT_SECONDS, LOST_SECONDS, Link, allow_many_files, readable
from ldmole_dist.cluster.network import interfaces
from ldmole_dist.cluster.output import say
from ldmole_dist.cluster.rank_environment import Place
from ldmole_dist.cluster.relay import Relay

STOPPED_SECONDS = 10.0  # that a rank may be stopped (SIGSTOP) before it counts as failed
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_libc = ctypes.CDLL(None)
# What torchrun says to its processes: that there is a store at MASTER_PORT (rank 0 makes ours), and that one thread is enough.
_OF_TORCHRUN = ("TORCHELASTIC_USE_AGENT_STORE", "OMP_NUM_THREADS")


class Supervisor:
    """Args:
    place: of the rank.
    command: of the rank.
    exports: environment variables for it.
    job: name of the job, as the watch knows it.
    interface: of the network, or None to take the one that leads to the watch.
    """

    def __init__(
        self, place: Place, command: Sequence[str], exports: Mapping[str, str], job: str, interface: str | None
    ) -> None:
        self.place, self.command, self.exports, self.job, self.interface = place, command, exports, job, interface
        self.child: subprocess.Popen[bytes] | None = None
        self._relays: list[Relay] = []
        self._pulses, self._remote = -1, True
        self._pulse, self._pulse_time = "", time.monotonic()
        self._reported = self._asked = False
        self._parent = os.getppid()
        self._stopped_since: float | None = None
        self._oom_kills = _oom_kills()

    def run(self, watch: tuple[str, int], patience: float = 120.0) -> int:
        """Serve until the watch ends the job.

        Args:
            watch: address and port.
            patience: seconds to wait for it to be there.

        Returns:
            0, or the exit code of the rank, or 1 where the job failed elsewhere.
        """
        link = self._connect(watch, patience)
        if link is None:
            say(f"rank {self.place.rank}: no answer from the watch of the job at {watch[0]}:{watch[1]}")
            return 1
        # What `ldmole launch` has started on this host hears from it what happens to the terminal.
        self._remote = not watch[0].startswith("127.") and "TORCHELASTIC_RUN_ID" not in os.environ
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                signal.signal(number, self._note)
        with socket.socket() as s:  # rank 0's is where the ranks will meet
            s.bind(("", 0))
            port = s.getsockname()[1]
        known = interfaces()
        address = known.get(self.interface or "", link.own_address)
        name = self.interface or next((name for name, own in known.items() if own == address), "")
        where = {"host": socket.gethostname(), "address": address, "port": port, "interface": name}
        link.send("hello", job=self.job, rank=self.place.rank, size=self.place.size, **where)
        if self.interface is not None and self.interface not in known:
            there = ", ".join(f"{name} ({own})" for name, own in known.items())
            self._fail(
                link, f"has no network interface {self.interface!r} with an IPv4 address, but {there}", final=True
            )
        try:
            return self._serve(link)
        finally:
            self._end_rank()
            link.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _connect(self, watch: tuple[str, int], patience: float) -> Link | None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                return Link(socket.create_connection(watch, timeout=5))
            except OSError:
                time.sleep(0.5)
        return None

    def _serve(self, link: Link) -> int:
        heard = sent = looked = time.monotonic()
        while True:
            ready = readable([link] if self.child is None else [link, self._pulses], 0.2)
            now = time.monotonic()
            if now - looked > LOST_SECONDS / 2:  # the host was suspended: nobody could be heard, nothing could be done
                heard = now
                self._pulse_time += now - looked
            looked = now
            for message in link.receive() if link in ready else ():
                heard = now
                if message["kind"] == "go":
                    self._start(link, message["environment"])
                elif message["kind"] == "stop" and self.child is not None:
                    self.child.terminate()
                elif message["kind"] == "release":
                    return self.child.returncode if self.child is not None else 1
                elif message["kind"] == "end":
                    self._end_rank(stacks=message["stacks"])
                    return 1
            if link.closed or now - heard > LOST_SECONDS:
                if not self._reported:
                    say(f"rank {self.place.rank} on {socket.gethostname()}: ended, the watch of the job is gone")
                return 1
            if self._asked:
                # A launcher signals ranks one after another; the watch will tell all of them at once.
                self._asked = False
                link.send("asked")
            if self._pulses in ready:
                self._read_pulses(now)
            if now - sent > BEAT_SECONDS:
                link.send("beat", pulse=self._pulse, age=now - self._pulse_time)
                sent = now
            if not self._reported:
                self._look(link, now)

    def _start(self, link: Link, environment: dict[str, str]) -> None:
        self._pulses, end = os.pipe2(os.O_NONBLOCK)
        skipped = _OF_TORCHRUN if "TORCHELASTIC_RUN_ID" in os.environ else ()
        own = {name: value for name, value in os.environ.items() if name not in skipped}
        if self.interface is not None:
            environment["NCCL_SOCKET_IFNAME"] = self.interface
        elif "GLOO_SOCKET_IFNAME" in own:  # this host knows better
            environment.pop("GLOO_SOCKET_IFNAME", None)
        allow_many_files()  # ranks of a large job have a connection to each other one
        try:
            self.child = subprocess.Popen(
                self.command,
                env=own | environment | dict(self.exports) | {HEARTBEAT_FD: str(end)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C comes to the watch alone
                pass_fds=[end],
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            self._fail(link, f"cannot be started: {error}", final=True)
            return
        pipes: list[tuple[IO[bytes] | None, int]] = [(self.child.stdout, 1), (self.child.stderr, 2)]
        self._relays = [Relay(pipe, fd) for pipe, fd in pipes if pipe is not None]
        for relay in self._relays:
            relay.start()

    def _look(self, link: Link, now: float) -> None:
        """Report what has become of the rank, once."""
        if self.child is not None and self.child.poll() is not None:
            self._end_all(self.child)
            out_of_memory = _oom_kills() > self._oom_kills
            link.send("exited", code=self.child.returncode, lines=self._last_lines(), out_of_memory=out_of_memory)
            self._reported = True
        elif os.getppid() != self._parent or (self._remote and self._hung_up):
            self._fail(link, "the launcher's connection to this host is gone (its process or its ssh session ended)")
        elif self.child is not None and _is_stopped(self.child.pid):
            self._stopped_since = self._stopped_since or now
            if now - self._stopped_since > STOPPED_SECONDS:
                self._fail(link, f"stopped by a signal (SIGSTOP) for {STOPPED_SECONDS:.0f} s")
        else:
            self._stopped_since = None

    @property
    def _hung_up(self) -> bool:
        """Whether nobody reads this process's output any more."""
        poll = select.poll()
        poll.register(1, 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
        return gone or any(relay.broken for relay in self._relays)

    def _fail(self, link: Link, how: str, final: bool = False) -> None:
        link.send("failed", how=how, lines=self._last_lines(), final=final)
        self._reported = True

    def _last_lines(self) -> list[str]:
        return [line for relay in self._relays for line in relay.last_lines(12)][-12:]

    def _read_pulses(self, now: float) -> None:
        *_, last, _ = os.read(self._pulses, 65536).split(b"\n")
        self._pulse, self._pulse_time = last.decode(errors="replace"), now

    def _end_rank(self, stacks: bool = False) -> None:
        """End the rank at once, and what it has started: a peer is gone, nothing can be saved together any more."""
        if self.child is None:
            return
        if stacks and self.child.poll() is None:
            self.child.send_signal(signal.SIGUSR1)
            time.sleep(1)
        self._end_all(self.child)

    def _end_all(self, child: subprocess.Popen[bytes]) -> None:
        """End the rank with all that it has started, which are this process's descendants whatever they did."""
        while left := [process for process in psutil.Process().children(recursive=True) if _is_alive(process)]:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _, alive = psutil.wait_procs(left, timeout=2)
            if alive:  # in the kernel's hands, a device's or a file system's; they end when it lets go of them
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)
        for relay in self._relays:
            relay.join(1)  # what is left in its pipes


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _oom_kills() -> int:
    """Processes that this host's kernel has ended for lack of memory."""
    with open("/proc/vmstat") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
