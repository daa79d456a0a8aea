"""The coordinator with real supervisors, and shell commands in place of ranks."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from ldmole_dist.cluster import supervisor
from ldmole_dist.cluster.coordinator import Coordinator
from ldmole_dist.cluster.job_result import Failure, JobResult
from ldmole_dist.cluster.launch import supervisor_command
from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PREEMPTED

WORLD_SIZE = 3
FOREVER = "sleep 1000"


class Job:
    """Coordinator and supervisors of a job whose ranks all run the same shell command."""

    def __init__(self, folder: Path, command: str, stall_seconds: float = 60.0) -> None:
        self.folder, self.status_lines = folder, list[str]()
        self.coordinator = Coordinator("127.0.0.1", "job", WORLD_SIZE, stall_seconds, self.status_lines.append)
        arguments = ["--coordinator", f"127.0.0.1:{self.coordinator.address[1]}", "--job", "job"]
        script = supervisor_command(["sh", "-c", command, "sh", str(folder)], arguments, {"EXPORTED": "yes"}, None)
        self.supervisors = []
        for rank in range(WORLD_SIZE):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(WORLD_SIZE),
                "TORCHELASTIC_RUN_ID": "1",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
            }
            with (folder / f"output_{rank}").open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, *script], env=environment, stdout=file, stderr=file, cwd=folder
                )
            self.supervisors.append(process)
        self.launcher_exit_code: int | None = None

    def serve(self) -> JobResult:
        try:
            return self.coordinator.serve(lambda: self.launcher_exit_code)
        finally:
            self.coordinator.close()

    def failure(self) -> Failure:
        """Run the job, which must fail, and return the failure."""
        failure = self.serve().failure
        assert failure is not None
        return failure

    def wait(self) -> list[int]:
        """Return the exit codes of the supervisors."""
        return [process.wait(20) for process in self.supervisors]

    @property
    def ranks(self) -> list[psutil.Process]:
        return [child for process in self.supervisors for child in psutil.Process(process.pid).children()]

    def when_running(self, action: Callable[[], None]) -> None:
        """Do something in a thread once all ranks have created their file "up_RANK"."""

        def wait() -> None:
            deadline = time.monotonic() + 30
            while not self.all_running and time.monotonic() < deadline:
                time.sleep(0.05)
            action()

        threading.Thread(target=wait, daemon=True).start()

    @property
    def all_running(self) -> bool:
        return len(list(self.folder.glob("up_*"))) == WORLD_SIZE

    def output(self, rank: int) -> str:
        return (self.folder / f"output_{rank}").read_text()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    created: list[Job] = []

    def create(command: str, **options: float) -> Job:
        created.append(Job(tmp_path, command, **options))
        return created[-1]

    yield create
    for job in created:
        job.coordinator.close()
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


def test_ranks_start_together_with_their_environment(jobs: Callable[..., Job], tmp_path: Path) -> None:
    dropped = "${TORCHELASTIC_USE_AGENT_STORE-none} ${OMP_NUM_THREADS-none}"
    job = jobs(
        f'echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE, $EXPORTED, {dropped}"; '
        'echo "$MASTER_ADDR $MASTER_PORT ${GLOO_SOCKET_IFNAME-none}" > "$1/master_$RANK"'
    )
    assert job.serve() == JobResult(0) and job.wait() == [0] * WORLD_SIZE
    for rank in range(WORLD_SIZE):
        assert job.output(rank) == f"rank {rank} of {WORLD_SIZE}, {rank} of {WORLD_SIZE}, yes, none none\n"
    (master,) = {path.read_text() for path in tmp_path.glob("master_*")}
    assert master.startswith("127.0.0.1 ") and "none" in master
    assert job.status_lines == [f"starting all ranks: 0, 1, 2 on {os.uname().nodename} (127.0.0.1)"]


def test_failure_names_the_first_failed_rank_with_its_last_lines(jobs: Callable[..., Job], tmp_path: Path) -> None:
    job = jobs(f'if [ $RANK = 1 ]; then echo "something broke" >&2; exit 7; fi; {FOREVER}')
    result = job.serve()
    assert result.exit_code == 1 and result.failure is not None and not result.failure.permanent
    assert result.failure.source == f"rank 1 on {os.uname().nodename}"
    assert "exited with code 7" in result.failure.description
    assert result.failure.report().splitlines()[-1] == "launch:   | something broke"
    assert job.wait() == [1] * WORLD_SIZE and no_process_in(tmp_path)


@pytest.mark.parametrize("exit_code", [3, 1])
def test_cause_is_not_a_rank_that_failed_because_of_another(jobs: Callable[..., Job], exit_code: int) -> None:
    # Exit code 3 says that another rank failed; exit code 1 is that of a rank whose peer vanished during a collective.
    job = jobs(f'case $RANK in 0) exit {exit_code};; 1) sleep 1; echo "error: no such file"; exit 2;; esac; {FOREVER}')
    result = job.serve()
    assert result.exit_code == EXIT_EXPLAINED and result.failure is not None and result.failure.permanent
    assert result.failure.source.startswith("rank 1 ") and result.failure.last_lines == ["error: no such file"]


def test_killed_rank_ends_its_children_and_all_other_ranks(jobs: Callable[..., Job], tmp_path: Path) -> None:
    # One of the children has a session of its own.
    job = jobs(f'setsid sh -c "{FOREVER}; true" sh "$1" & sh -c "{FOREVER}; true" sh "$1" & touch "$1/up_$RANK"; wait')
    job.when_running(lambda: job.ranks[2].kill())
    assert "was killed by signal 9 (SIGKILL)" in job.failure().description
    assert job.wait() == [1] * WORLD_SIZE and no_process_in(tmp_path)


def test_killed_supervisor_ends_its_rank(jobs: Callable[..., Job]) -> None:
    job = jobs(f'touch "$1/up_$RANK"; exec {FOREVER}')
    ranks: list[psutil.Process] = []

    def kill_supervisor() -> None:
        ranks.extend(job.ranks)
        job.supervisors[0].kill()

    job.when_running(kill_supervisor)
    assert "rank(s) 0 on" in job.failure().source
    job.wait()
    assert len(ranks) == WORLD_SIZE and not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)


def test_loss_of_the_coordinator_ends_all_ranks(jobs: Callable[..., Job]) -> None:
    job = jobs(f'touch "$1/up_$RANK"; exec {FOREVER}')

    class Interrupted(Exception):
        pass

    def interrupt() -> None:
        if job.all_running:
            raise Interrupted

    with pytest.raises(Interrupted):
        job.coordinator.serve(interrupt)
    job.coordinator.close()
    assert job.wait() == [1] * WORLD_SIZE and "the connection to the coordinator was lost" in job.output(0)


def test_suspended_rank_counts_as_failed(jobs: Callable[..., Job]) -> None:
    job = jobs(f'touch "$1/up_$RANK"; exec {FOREVER}')
    job.when_running(lambda: job.ranks[1].suspend())
    started = time.monotonic()
    failure = job.failure()
    assert failure.source.startswith("rank 1 ") and "SIGSTOP" in failure.description
    assert time.monotonic() - started > supervisor.SUSPENDED_SECONDS  # a debugger may stop a rank for a moment
    assert job.wait() == [1] * WORLD_SIZE


@pytest.mark.full
def test_stall_prints_the_stacks_of_all_ranks(jobs: Callable[..., Job]) -> None:
    program = (
        "import os, pathlib, sys, time; from ldmole_dist.cluster.heartbeat import heartbeat, show_stacks; show_stacks()\n"
        "rank, folder = os.environ['RANK'], pathlib.Path(sys.argv[1])\n"
        "def training_step(): time.sleep(1000)\n"
        "(folder / f'up_{rank}').touch()\n"
        "while len(list(folder.glob('up_*'))) < 3: time.sleep(0.1)\n"
        "for step in range(6): heartbeat(f'step {step}'); time.sleep(0.7 if rank != '1' or step < 2 else 1000)\n"
        "training_step()\n"
    )
    job = jobs(f"exec {shlex.quote(sys.executable)} -c '{program.replace(chr(39), chr(34))}' \"$1\"", stall_seconds=6.0)
    failure = job.failure()
    assert failure.source.startswith("rank 1 "), failure
    assert "no progress for 6 s" in failure.description and "'step 2'" in failure.description
    job.wait()
    assert "in training_step" in job.output(0)
    assert "in <module>" in job.output(1) and "in training_step" not in job.output(1)


def test_signal_to_one_supervisor_stops_all_ranks(jobs: Callable[..., Job]) -> None:
    job = jobs(f'trap "exit {EXIT_PREEMPTED}" TERM; touch "$1/up_$RANK"; {FOREVER} & wait')
    job.when_running(lambda: job.supervisors[2].send_signal(signal.SIGTERM))
    assert job.serve() == JobResult(EXIT_PREEMPTED, stop_requested=True)
    assert job.wait() == [EXIT_PREEMPTED] * WORLD_SIZE


def test_second_stop_request_kills_all_ranks(jobs: Callable[..., Job]) -> None:
    job = jobs(f'trap "" TERM; touch "$1/up_$RANK"; {FOREVER}')

    def request_twice() -> None:
        for _ in range(2):
            job.coordinator.request_stop()
            time.sleep(1.2)  # more than SAME_REQUEST_SECONDS

    job.when_running(request_twice)
    assert job.failure().description == "received a second stop request"
    assert job.wait() == [1] * WORLD_SIZE


def test_simultaneous_signals_are_one_stop_request(jobs: Callable[..., Job]) -> None:
    job = jobs(f'trap "exit {EXIT_PREEMPTED}" TERM; touch "$1/up_$RANK"; {FOREVER} & wait')

    def close_session() -> None:
        for process in job.supervisors:
            process.send_signal(signal.SIGHUP)
        job.coordinator.request_stop()
        job.coordinator.request_stop()

    job.when_running(close_session)
    assert job.serve() == JobResult(EXIT_PREEMPTED, stop_requested=True)


def test_stop_before_anything_is_saved_has_the_exit_code_of_a_preemption(jobs: Callable[..., Job]) -> None:
    job = jobs(f'touch "$1/up_$RANK"; exec {FOREVER}')
    job.when_running(job.coordinator.request_stop)
    result = job.serve()
    assert result.exit_code == EXIT_PREEMPTED
    assert result.failure is not None and "anything to save" in result.failure.description


def permanent_failure(
    command: list[str], rank: int, started_world_size: int, world_size: int, interface: str | None = None
) -> Failure:
    """Return the permanent failure of a job with one process.

    Args:
        command: command of the process.
        rank, started_world_size: environment of the process.
        world_size: number of ranks that the coordinator expects.
        interface: network interface of the supervisor.
    """
    coordinator = Coordinator("127.0.0.1", "job", world_size, 60.0, lambda text: None)
    arguments = ["--coordinator", f"127.0.0.1:{coordinator.address[1]}", "--job", "job"]
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(started_world_size)}
    script = supervisor_command(command, arguments, {}, interface)
    process = subprocess.Popen([sys.executable, *script], env=environment)
    try:
        failure = coordinator.serve(lambda: None).failure
        coordinator.close()
        assert process.wait(20) == 1 and failure is not None and failure.permanent
        return failure
    finally:
        process.kill()
        process.wait()


def test_command_that_cannot_be_started_is_reported() -> None:
    assert "cannot be started" in permanent_failure(["/no/such/python"], 0, 1, world_size=1).description


def test_launcher_that_exits_before_all_ranks_start_is_reported(jobs: Callable[..., Job]) -> None:
    job = jobs(FOREVER)
    for process in job.supervisors[1:]:
        process.kill()
    job.launcher_exit_code = 255
    failure = job.failure()
    assert failure.source == "the launcher"
    assert "exited with code 255 before rank(s)" in failure.description


def test_connections_from_other_programs_are_rejected(jobs: Callable[..., Job]) -> None:
    job = jobs("true")
    first_messages: Sequence[bytes] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 200_000 + b"\n",
        b'{"kind": "hello", "job": "another"}\n',
        b"[1]\n",
        b"",
    ]
    for data in first_messages:
        with socket.create_connection(job.coordinator.address) as s:
            s.sendall(data)
    assert job.serve() == JobResult(0)


def test_wrong_world_size_is_reported() -> None:
    description = permanent_failure(["true"], 0, 4, world_size=8).description
    assert "rank 0 of 4, but the job has 8 ranks" in description


def test_missing_interface_is_reported() -> None:
    description = permanent_failure(["true"], 0, 1, world_size=1, interface="eth9").description
    assert "no network interface 'eth9'" in description and "lo (127.0.0.1)" in description
