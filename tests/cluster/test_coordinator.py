"""The watch and real supervisors, with small commands in the place of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from ldmole_dist.cluster import supervisor as supervise
from ldmole_dist.cluster.coordinator import Watch
from ldmole_dist.cluster.launch import supervised
from ldmole_dist.cluster.verdict import Failure, Verdict
from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PREEMPTED

SIZE = 3
FOREVER = "sleep 1000"


class Job:
    """Supervisors of the same shell command, and their watch."""

    def __init__(self, folder: Path, command: str, stall_seconds: float = 60.0) -> None:
        self.folder, self.told = folder, list[str]()
        self.watch = Watch("127.0.0.1", "job", SIZE, stall_seconds, self.told.append)
        at = ["--watch", f"127.0.0.1:{self.watch.address[1]}", "--job", "job"]
        argv = [sys.executable, *supervised(["sh", "-c", command, "sh", str(folder)], at, {"EXPORTED": "yes"}, None)]
        self.supervisors = []
        for rank in range(SIZE):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(SIZE),
                "TORCHELASTIC_RUN_ID": "1",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
            }
            with (folder / f"said_{rank}").open("wb") as file:
                process = subprocess.Popen(argv, env=environment, stdout=file, stderr=file, cwd=folder)
            self.supervisors.append(process)
        self.launcher_code: int | None = None

    def serve(self) -> Verdict:
        try:
            return self.watch.serve(lambda: self.launcher_code)
        finally:
            self.watch.close()

    def end(self) -> list[int]:
        """Exit codes of the supervisors."""
        return [process.wait(20) for process in self.supervisors]

    @property
    def ranks(self) -> list[psutil.Process]:
        return [child for process in self.supervisors for child in psutil.Process(process.pid).children()]

    def when(self, condition: Callable[[], bool], action: Callable[[], None]) -> None:
        """Do something once a condition holds, while the watch is served."""

        def wait() -> None:
            deadline = time.monotonic() + 30
            while not condition() and time.monotonic() < deadline:
                time.sleep(0.05)
            action()

        threading.Thread(target=wait, daemon=True).start()

    @property
    def all_run(self) -> bool:
        return len(list(self.folder.glob("up_*"))) == SIZE

    def said(self, rank: int) -> str:
        return (self.folder / f"said_{rank}").read_text()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(command: str, **options: float) -> Job:
        made.append(Job(tmp_path, command, **options))
        return made[-1]

    yield make
    for job in made:
        job.watch.close()
        for process in job.supervisors:
            process.kill()
            process.wait()


def no_process_in(folder: Path) -> bool:
    for process in psutil.process_iter():
        try:
            if str(folder) in process.cmdline():
                return False
        except psutil.Error:
            continue
    return True


def test_all_ranks_start_and_end_together(jobs: Callable[..., Job], tmp_path: Path) -> None:
    not_for_ranks = "${TORCHELASTIC_USE_AGENT_STORE-none} ${OMP_NUM_THREADS-none}"
    job = jobs(
        f'echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE, $EXPORTED, {not_for_ranks}"; '
        'echo "$MASTER_ADDR $MASTER_PORT ${GLOO_SOCKET_IFNAME-none}" > "$1/master_$RANK"'
    )
    assert job.serve() == Verdict(0) and job.end() == [0] * SIZE
    for rank in range(SIZE):
        assert job.said(rank) == f"rank {rank} of {SIZE}, {rank} of {SIZE}, yes, none none\n"
    assert len({path.read_text() for path in tmp_path.glob("master_*")}) == 1
    assert (tmp_path / "master_0").read_text().startswith("127.0.0.1 ") and "none" in (
        tmp_path / "master_0"
    ).read_text()
    assert job.told == [f"all ranks start: 0, 1, 2 on {os.uname().nodename} (127.0.0.1)"]


def test_the_first_to_fail_is_named_with_its_last_lines(jobs: Callable[..., Job], tmp_path: Path) -> None:
    job = jobs(f'if [ $RANK = 1 ]; then echo "something broke" >&2; exit 7; fi; {FOREVER}')
    verdict = job.serve()
    assert verdict.code == 1 and verdict.failure is not None and not verdict.failure.final
    assert verdict.failure.who == f"rank 1 on {os.uname().nodename}" and "exit code 7" in verdict.failure.how
    assert verdict.failure.text().splitlines()[-1] == "launch:   | something broke"
    assert job.end() == [1] * SIZE and no_process_in(tmp_path)


@pytest.mark.parametrize("code", [3, 1])
def test_one_that_only_follows_is_not_blamed(jobs: Callable[..., Job], code: int) -> None:
    # 3 says so; 1 is one whose peer was gone in the midst of a collective.
    job = jobs(f'case $RANK in 0) exit {code};; 1) sleep 1; echo "error: no such file"; exit 2;; esac; {FOREVER}')
    verdict = job.serve()
    assert verdict.code == EXIT_EXPLAINED and verdict.failure is not None and verdict.failure.final
    assert verdict.failure.who.startswith("rank 1 ") and verdict.failure.lines == ["error: no such file"]


def test_a_killed_rank_takes_its_own_children_and_all_others_with_it(jobs: Callable[..., Job], tmp_path: Path) -> None:
    # One of them in a session of its own.
    job = jobs(f'setsid sh -c "{FOREVER}; true" sh "$1" & sh -c "{FOREVER}; true" sh "$1" & touch "$1/up_$RANK"; wait')
    job.when(lambda: job.all_run, lambda: job.ranks[2].kill())
    verdict = job.serve()
    assert verdict.failure is not None and "killed by signal 9 (SIGKILL)" in verdict.failure.how
    assert job.end() == [1] * SIZE and no_process_in(tmp_path)


def test_a_supervisor_that_is_killed_takes_its_rank_with_it(jobs: Callable[..., Job], tmp_path: Path) -> None:
    job = jobs(f'touch "$1/up_$RANK"; exec {FOREVER}')
    ranks: list[psutil.Process] = []

    def kill_one() -> None:
        ranks.extend(job.ranks)
        job.supervisors[0].kill()

    job.when(lambda: job.all_run, kill_one)
    verdict = job.serve()
    assert verdict.failure is not None and "rank(s) 0 on" in verdict.failure.who
    job.end()
    assert len(ranks) == SIZE and not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)


def test_a_watch_that_is_gone_ends_all_ranks(jobs: Callable[..., Job], tmp_path: Path) -> None:
    job = jobs(f'touch "$1/up_$RANK"; exec {FOREVER}')

    class Gone(Exception):
        pass

    def code() -> None:
        if job.all_run:
            raise Gone

    with pytest.raises(Gone):
        job.watch.serve(code)
    job.watch.close()
    assert job.end() == [1] * SIZE and "the watch of the job is gone" in job.said(0)


def test_a_stopped_rank_counts_as_failed(jobs: Callable[..., Job]) -> None:
    job = jobs(f'touch "$1/up_$RANK"; exec {FOREVER}')
    job.when(lambda: job.all_run, lambda: job.ranks[1].suspend())
    started = time.monotonic()
    verdict = job.serve()
    assert (
        verdict.failure is not None and verdict.failure.who.startswith("rank 1 ") and "SIGSTOP" in verdict.failure.how
    )
    assert time.monotonic() - started > supervise.STOPPED_SECONDS  # a glance with a debugger is not a failure
    assert job.end() == [1] * SIZE


@pytest.mark.full
def test_a_stall_is_told_with_stacks_of_all(jobs: Callable[..., Job], tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys, time; from ldmole_dist.cluster.heartbeat import heartbeat, show_stacks; show_stacks()\n"
        "rank, folder = os.environ['RANK'], pathlib.Path(sys.argv[1])\n"
        "def training_step(): time.sleep(1000)\n"
        "(folder / f'up_{rank}').touch()\n"
        "while len(list(folder.glob('up_*'))) < 3: time.sleep(0.1)\n"
        "for step in range(6): heartbeat(f'step {step}'); time.sleep(0.7 if rank != '1' or step < 2 else 1000)\n"
        "training_step()\n"
    )
    job = jobs(f"exec {sys.executable} -c '{program.replace(chr(39), chr(34))}' \"$1\"", stall_seconds=6.0)
    verdict = job.serve()
    assert verdict.failure is not None and verdict.failure.who.startswith("rank 1 "), verdict
    assert "no progress for 6 s" in verdict.failure.how and "'step 2'" in verdict.failure.how
    job.end()
    assert "in training_step" in job.said(0) and "in <module>" in job.said(1) and "in training_step" not in job.said(1)


def test_asked_to_end_all_are_told_at_once(jobs: Callable[..., Job]) -> None:
    job = jobs(f'trap "exit {EXIT_PREEMPTED}" TERM; touch "$1/up_$RANK"; {FOREVER} & wait')
    # As a launcher would, one after the other: the first is enough.
    job.when(lambda: job.all_run, lambda: job.supervisors[2].send_signal(signal.SIGTERM))
    assert job.serve() == Verdict(EXIT_PREEMPTED, stopped=True)
    assert job.end() == [EXIT_PREEMPTED] * SIZE


def test_asked_twice_all_end_at_once(jobs: Callable[..., Job]) -> None:
    job = jobs(f'trap "" TERM; touch "$1/up_$RANK"; {FOREVER}')

    def ask_twice() -> None:
        for _ in range(2):
            job.watch.request_stop()
            time.sleep(1.2)  # sooner, it would be the same request

    job.when(lambda: job.all_run, ask_twice)
    verdict = job.serve()
    assert verdict.failure is not None and verdict.failure.how == "asked twice to end"
    assert job.end() == [1] * SIZE


def test_signals_that_come_together_are_one_request(jobs: Callable[..., Job]) -> None:
    job = jobs(f'trap "exit {EXIT_PREEMPTED}" TERM; touch "$1/up_$RANK"; {FOREVER} & wait')

    def end_of_a_session() -> None:
        for process in job.supervisors:
            process.send_signal(signal.SIGHUP)
        job.watch.request_stop()
        job.watch.request_stop()

    job.when(lambda: job.all_run, end_of_a_session)
    assert job.serve() == Verdict(EXIT_PREEMPTED, stopped=True)


def test_a_rank_that_has_nothing_to_save_yet_can_be_started_again(jobs: Callable[..., Job]) -> None:
    job = jobs(f'touch "$1/up_$RANK"; exec {FOREVER}')
    job.when(lambda: job.all_run, job.watch.request_stop)
    verdict = job.serve()
    assert verdict.code == EXIT_PREEMPTED and verdict.failure is not None and "anything to save" in verdict.failure.how


def refused(command: list[str], place: tuple[int, int], size: int, interface: str | None = None) -> Failure:
    """Why the watch of a job of some size ends it, whose only process was started as rank (of so many)."""
    watch = Watch("127.0.0.1", "job", size, 60.0, lambda text: None)
    at = ["--watch", f"127.0.0.1:{watch.address[1]}", "--job", "job"]
    environment = os.environ | {"RANK": str(place[0]), "WORLD_SIZE": str(place[1])}
    process = subprocess.Popen([sys.executable, *supervised(command, at, {}, interface)], env=environment)
    try:
        failure = watch.serve(lambda: None).failure
        watch.close()
        assert process.wait(20) == 1 and failure is not None and failure.final
        return failure
    finally:
        process.kill()
        process.wait()


def test_what_cannot_be_started_is_said() -> None:
    assert "cannot be started" in refused(["/no/such/python"], (0, 1), size=1).how


def test_a_launcher_that_ends_before_its_ranks_start(jobs: Callable[..., Job]) -> None:
    job = jobs(FOREVER)
    for process in job.supervisors[1:]:
        process.kill()
    job.launcher_code = 255
    verdict = job.serve()
    assert (
        verdict.failure is not None
        and "exit code 255" in verdict.failure.how
        and "never started" in verdict.failure.how
    )


def test_strangers_are_turned_away(jobs: Callable[..., Job]) -> None:
    import socket

    job = jobs("true")
    strangers: Sequence[bytes] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 200_000 + b"\n",
        b'{"kind": "hello", "job": "another"}\n',
        b"[1]\n",
        b"",
    ]
    for data in strangers:
        with socket.create_connection(job.watch.address) as s:
            s.sendall(data)
    assert job.serve() == Verdict(0)


def test_a_job_of_another_size_is_refused() -> None:
    assert "rank 0 of 4, but the job has 8 ranks" in refused(["true"], (0, 4), size=8).how


def test_an_interface_that_is_not_there_is_named() -> None:
    how = refused(["true"], (0, 1), size=1, interface="eth9").how
    assert "no network interface 'eth9'" in how and "lo (127.0.0.1)" in how
