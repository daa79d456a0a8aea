"""Running the probe on a host, over ssh or srun, and talking with it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ldmole_dist.cluster.probe import MARK
from ldmole_dist.cluster.runners import Start

PATIENCE_SECONDS = 90.0  # for a host to answer; importing torch from a slow file system takes its time


class Visit:
    """A probe that runs on a host.

    Args:
        start: how the job is started, which says how to get there.
        host: its name.
        exports: environment variables that ranks get.
        questions: arguments of `probe.look`.

    Attributes:
        findings: what it found, or None.
        problem: why there are none.
    """

    def __init__(self, start: Start, host: str, exports: Mapping[str, str], questions: Mapping[str, Any]) -> None:
        self.host, self.problem = host, ""
        self.findings: dict[str, Any] | None = None
        probe = [sys.executable, "-m", "ldmole_dist.cluster.probe", json.dumps(dict(questions))]
        command = ["env", *(f"{name}={value}" for name, value in exports.items()), *probe]
        if start.launcher == "slurm":
            argv = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", *command]
        elif start.launcher in ("local", "torchrun"):
            argv = command
        else:
            remote = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
            options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *shlex.split(start.ssh_args)]
            argv = ["ssh", *options, host, remote]
        pipe = subprocess.PIPE
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `__exit__` closes it
        self._process = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, start_new_session=True
        )

    def wait(self) -> None:
        """Until it has found out, or failed to."""
        line = self._answer()
        if line is not None:
            self.findings = json.loads(line)
            return
        self._process.wait()
        self._errors.seek(0)
        said = [text for text in self._errors.read().splitlines() if text.strip()]
        self.problem = said[-1] if said else f"no answer within {PATIENCE_SECONDS:.0f} s"

    def ask(self, question: str) -> str | None:
        """One of those of `probe.answer`; None where no answer came."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._answer()

    def clock_skew(self) -> float:
        """Seconds that its clock is ahead of ours; of three readings, the one with the shortest way. Not a number where it
        does not answer."""
        readings = []
        for _ in range(3):
            before = time.time()
            there = float(self.ask("time") or "nan")
            after = time.time()
            readings.append((after - before, there - (before + after) / 2))
        return min(readings)[1]

    def __enter__(self) -> Visit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> str | None:
        assert self._process.stdout is not None
        timer = threading.Timer(PATIENCE_SECONDS, self._process.kill)
        timer.start()
        try:
            for line in self._process.stdout:
                if line.startswith(MARK):
                    return line.removeprefix(MARK).rstrip("\n")
            return None
        finally:
            timer.cancel()
