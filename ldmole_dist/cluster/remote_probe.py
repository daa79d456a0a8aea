"""Client of a probe (probe.py): starts it on a host, and asks it questions through stdin and stdout.

With the launchers "local" and "torchrun", the probe is started directly on this host. With the others, it is started over ssh
or srun, even on this host.
"""

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

from ldmole_dist.cluster.probe import MARKER
from ldmole_dist.cluster.runners import LaunchSpec

ANSWER_SECONDS = 90.0  # time for an answer; the import of torch from a slow network file system can take a minute


class RemoteProbe:
    """Probe (probe.py) on a host: the constructor starts the probe, and the exit of the context manager kills it.

    Args:
        spec: launcher of the job, which determines how to reach the host.
        host: name of the host.
        exports: environment variables for the probe, the same as for the ranks.
        arguments: arguments of `probe.inspect_host`.

    Attributes:
        findings: result of `probe.inspect_host`; None before `wait` and if the probe failed.
        error: error message of a failed probe; "" otherwise.
    """

    def __init__(self, spec: LaunchSpec, host: str, exports: Mapping[str, str], arguments: Mapping[str, Any]) -> None:
        self.host, self.error = host, ""
        self.findings: dict[str, Any] | None = None
        probe = [sys.executable, "-m", "ldmole_dist.cluster.probe", json.dumps(dict(arguments))]
        command = ["env", *(f"{name}={value}" for name, value in exports.items()), *probe]
        if spec.launcher == "slurm":
            argv = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", *command]
        elif spec.launcher in ("local", "torchrun"):
            argv = command
        else:
            remote = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
            options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *shlex.split(spec.ssh_args)]
            argv = ["ssh", *options, host, remote]
        pipe = subprocess.PIPE
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `__exit__` closes it
        self._process = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=self._stderr, text=True, start_new_session=True
        )

    def wait(self) -> None:
        """Wait for the result of the probe, and set `findings` or `error`."""
        line = self._read_answer()
        if line is not None:
            self.findings = json.loads(line)
            return
        self._process.wait()
        self._stderr.seek(0)
        lines = [text for text in self._stderr.read().splitlines() if text.strip()]
        self.error = lines[-1] if lines else f"no answer within {ANSWER_SECONDS:.0f} s"

    def ask(self, question: str) -> str | None:
        """Return the answer to a question for `probe.answer`; None if the probe has ended.

        If the probe does not answer within ANSWER_SECONDS, the probe is killed and None is returned.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._read_answer()

    def clock_skew(self) -> float:
        """Return the seconds by which the clock of the probed host is ahead of this host's; NaN if the probe does not answer.

        The clock is read three times, and the reading with the shortest round trip is used.
        """
        measurements = []
        for _ in range(3):
            before = time.time()
            remote_time = float(self.ask("time") or "nan")
            after = time.time()
            measurements.append((after - before, remote_time - (before + after) / 2))
        return min(measurements)[1]

    def __enter__(self) -> RemoteProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _read_answer(self) -> str | None:
        assert self._process.stdout is not None
        timer = threading.Timer(ANSWER_SECONDS, self._process.kill)  # closes stdout, which ends the loop below
        timer.start()
        try:
            for line in self._process.stdout:
                if line.startswith(MARKER):
                    return line.removeprefix(MARKER).rstrip("\n")
            return None
        finally:
            timer.cancel()
