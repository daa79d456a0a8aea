"""Processes that tests can signal and wait for: `ldmole` commands, and training runs with one process per rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ldmole_dist.cli import main
from ldmole_dist.distributed import free_port
from ldmole_dist.selftest.processes import start_process

TRAIN = Path(__file__).parents[1] / "launch" / "train.py"


class ForkedCommand:
    """An `ldmole` command in a process that is forked instead of started by an interpreter; used like a `Popen`.

    Args:
        arguments: of `ldmole`.
        environment: environment variables.
        output: file for stdout and stderr.
        folder: the working folder.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], output: Path, folder: Path | None = None
    ) -> None:
        self._arguments = arguments
        folder = folder or Path.cwd()
        self._process = start_process(_run, arguments, output, folder, environment=environment, daemon=False)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.pid and self._process.exitcode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(["ldmole", *self._arguments], timeout or 0.0)
        return self._process.exitcode


def _run(arguments: Sequence[str], output: Path, folder: Path) -> None:
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["ldmole", *arguments]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.exit(main(arguments))


class Launched:
    """`size` ranks of launch/train.py; those still running are killed on exit.

    Args:
        config: of the run.
        overrides: of the config, for all ranks.
        size: number of ranks.
        rank_overrides: further overrides, by rank.
        forked: whether the ranks are forked from a process that has imported the package, or start an interpreter each.
    """

    def __init__(
        self,
        config: Path,
        *overrides: str,
        size: int = 2,
        rank_overrides: dict[int, list[str]] | None = None,
        forked: bool = True,
    ) -> None:
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / f"rank_{rank}.txt" for rank in range(size)]
        self.ranks: list[ForkedCommand | subprocess.Popen[bytes]] = []
        for rank, output in enumerate(self._outputs):
            arguments = [f"--local_rank={rank}", str(config), *overrides, *(rank_overrides or {}).get(rank, [])]
            environment = os.environ | common | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            output.touch()
            if forked:
                self.ranks.append(ForkedCommand(["train", *arguments], environment, output))
            else:
                with output.open("ab") as file:
                    command = [sys.executable, str(TRAIN), *arguments]
                    self.ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))

    def __enter__(self) -> Launched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """Send SIGKILL to every rank and wait for all."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()

    def wait(self, timeout: float) -> tuple[list[int], str]:
        """Wait for every rank; return the exit codes and all output, by rank.

        Args:
            timeout: seconds for each rank.
        """
        codes = [rank.wait(timeout) for rank in self.ranks]
        return codes, "\n".join(output.read_text() for output in self._outputs)

    @property
    def running(self) -> bool:
        """Whether no rank has ended."""
        return all(rank.poll() is None for rank in self.ranks)
