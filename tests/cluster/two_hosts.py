"""Two hosts on one machine: connected network namespaces, each with a host name, an address and an sshd."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil
import pytest

NAMES = ("ldmole0", "ldmole1")
ADDRESSES = ("10.77.31.1", "10.77.31.2")


def run(*command: str, check: bool = True) -> str:
    """Run a command on this machine, for a minute at most, and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def missing_requirement() -> str | None:
    """Return why the hosts cannot be created on this machine; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("/usr/sbin/sshd", "openssh-server"), ("pdsh", "pdsh")):
        if shutil.which(program) is None:
            return f"no {program} (on Debian: apt-get install {package})"
    try:
        run("ip", "netns", "add", "ldmole_try")
    except RuntimeError as error:
        return f"no network namespaces: {error}"
    run("ip", "netns", "del", "ldmole_try")
    return None


def skip_without_hosts() -> None:
    """Skip the test if the hosts cannot be created; fail it instead if LDMOLE_NEED_HOSTS is set, as in CI."""
    why = missing_requirement()
    if why is not None and "LDMOLE_NEED_HOSTS" in os.environ:
        pytest.fail(f"LDMOLE_NEED_HOSTS is set, but the two hosts cannot be created: {why}")
    if why is not None:
        pytest.skip(f"needs two hosts: {why}")


class TwoHosts:
    """Context manager for two hosts, which share the file system except for the mounts that `mount` creates.

    Args:
        folder: folder for keys and configuration files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ssh_args = f"-F {folder / 'ssh_config'}"
        self.hostfile = folder / "hostfile"

    def __enter__(self) -> TwoHosts:
        folder = self.folder
        Path("/run/sshd").mkdir(exist_ok=True)
        self._delete()
        for key in ("id", "hostkey"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        options = [f"IdentityFile {folder / 'id'}", "IdentitiesOnly yes", "StrictHostKeyChecking no"]
        options += ["UserKnownHostsFile /dev/null", "LogLevel ERROR", "User root"]
        (folder / "ssh_config").write_text("Host *\n" + "".join(f"  {option}\n" for option in options))
        self.hostfile.write_text("".join(f"{name} slots=2\n" for name in NAMES))
        for name in NAMES:
            known = "".join(f"{address} {other}\n" for address, other in zip(ADDRESSES, NAMES, strict=True))
            Path(f"/etc/netns/{name}").mkdir(parents=True)
            Path(f"/etc/netns/{name}/hosts").write_text(f"127.0.0.1 localhost\n{known}")
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "ldmole_a", "type", "veth", "peer", "name", "ldmole_b")
        for name, end, address in zip(NAMES, ("ldmole_a", "ldmole_b"), ADDRESSES, strict=True):
            run("ip", "link", "set", end, "netns", name, "name", "eth0")
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            self.start_sshd(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._delete()

    def start_sshd(self, name: str, *settings: str) -> None:
        """Start or restart the sshd of a host, with additional lines of sshd_config."""
        self.stop_sshd(name)
        address, config = ADDRESSES[NAMES.index(name)], self.folder / f"{name}.sshd"
        lines = [f"ListenAddress {address}", f"HostKey {self.folder / 'hostkey'}", f"PidFile {self._pid_file(name)}"]
        lines += [
            f"AuthorizedKeysFile {self.folder / 'id.pub'}",
            "PasswordAuthentication no",
            "UsePAM no",
            "StrictModes no",
        ]
        config.write_text("".join(f"{line}\n" for line in [*lines, *settings]))
        command = f"hostname {name}; exec /usr/sbin/sshd -f {config} -E {self.folder / name}.log"
        self._exec(name, "unshare", "-u", "sh", "-c", command)
        for _ in range(50):
            with contextlib.suppress(RuntimeError):
                self._exec(name, "ssh", *self.ssh_args.split(), name, "true")
                return
            time.sleep(0.1)
        raise RuntimeError(f"{name} does not answer over ssh")

    def stop_sshd(self, name: str) -> None:
        """Kill the sshd of a host and its sessions."""
        for process in [*self.sessions(name), *self._sshd(name)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait(10)
        self._pid_file(name).unlink(missing_ok=True)

    def sessions(self, name: str) -> list[psutil.Process]:
        """Return the processes of a host's sshd that serve one connection each."""
        return [session for sshd in self._sshd(name) for session in sshd.children()]

    def start(self, name: str, command: Sequence[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, with its output in a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def set_link(self, state: str) -> None:
        """Set the link between the hosts "up" or "down"."""
        run("ip", "-n", NAMES[1], "link", "set", "eth0", state)

    def mount(self, name: str, folder: Path, size: str) -> None:
        """Mount an empty disk that only one host sees, until its sshd stops."""
        (sshd,) = self._sshd(name)
        run("nsenter", "-t", str(sshd.pid), "-m", "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))

    def fill(self, name: str, folder: Path) -> None:
        """Fill the disk of a folder."""
        (sshd,) = self._sshd(name)
        filler = f"cat /dev/zero > {folder / 'filler'}"
        run(
            "nsenter", "-t", str(sshd.pid), "-m", "sh", "-c", filler, check=False
        )  # the command fails with "no space left"

    def _exec(self, name: str, *command: str) -> str:
        return run("ip", "netns", "exec", name, *command)

    def _pid_file(self, name: str) -> Path:
        return self.folder / f"{name}.pid"

    def _sshd(self, name: str) -> list[psutil.Process]:
        try:
            return [psutil.Process(int(self._pid_file(name).read_text()))]
        except (OSError, ValueError, psutil.NoSuchProcess):
            return []

    def _delete(self) -> None:
        for name in NAMES:
            self.stop_sshd(name)
            run("ip", "netns", "del", name, check=False)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)
        run("ip", "link", "del", "ldmole_a", check=False)  # left over from an interrupted run


def processes_of(job_folder: Path) -> list[psutil.Process]:
    """Return the processes on this machine, which includes both hosts, whose command line names a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(str(job_folder) in argument for argument in process.cmdline()) and process.pid != os.getpid():
                found.append(process)
    return found
