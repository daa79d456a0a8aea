"""Ranks on this machine: processes that join one process group and run the functions sent to them.

Used by the selftest, the benchmarks and the tests; training runs are started by a launcher instead.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal

import torch

from ldmole_dist.distributed import free_port
from ldmole_dist.engine.startup import start
from ldmole_dist.errors import PeerError, UserError
from ldmole_dist.selftest.processes import CPU_ENVIRONMENT, start_process

# After the first UserError or PeerError of a rank, `run` waits at most this long for the other ranks, because usually every
# rank raises one.
REPORT_SECONDS = 10.0

# Outcome of a function on one rank. "refused": it raised UserError or PeerError, which all ranks usually do together.
# "failed": it raised another exception, or the process ended.
Outcome = Literal["returned", "refused", "failed"]


class RankFailed(RuntimeError):
    """Raised by `LocalRanks.run` if the function raises or does not return in time on a rank, or if the rank's process ends."""


class LocalRanks:
    """Context manager for processes of one process group, with one GPU each if there are enough, otherwise on the CPU.

    The first `run` starts the processes, and `close` ends them. If a rank fails, exits or times out, others may be blocked in a
    collective, so `run` ends all of them, and the next `run` starts new ones. A `UserError` or `PeerError` on every rank does
    not end them.

    Args:
        size: number of ranks.
        timeout: maximum number of seconds for one `run`, including the start of the processes if it starts them.
    """

    def __init__(self, size: int, timeout: float = 300.0) -> None:
        self.size, self.timeout = size, timeout
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank.

        Args:
            function: function to call. It must be importable by name, and its arguments and result must be picklable.
            args: positional arguments of the function.
            kwargs: keyword arguments of the function.

        Returns:
            The results, by rank.

        Raises:
            RankFailed: if the function raised on a rank, a process ended, or a rank did not return in time. The message
                names the rank of the first failure that arrived, with the traceback if the function raised, or all ranks that
                did not return.
            OSError: if a process cannot be started, or has ended since the previous `run`.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        deadline = time.monotonic() + self.timeout
        outcomes: dict[int, tuple[Outcome, Any]] = {}
        failure: str | None = None
        while len(outcomes) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in outcomes]
            ready: list[Any] = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = ", ".join(str(rank) for rank in range(self.size) if rank not in outcomes)
                failure = (
                    failure or f"{function.__name__}: rank(s) {missing} did not return within {self.timeout:.0f} s"
                )
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    outcomes[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):  # ConnectionResetError if it ended with unread input
                    outcomes[rank] = "failed", "the process ended"
                outcome, value = outcomes[rank]
                if outcome != "returned" and failure is None:
                    failure = f"{function.__name__} failed on rank {rank}:\n{value}"
                if outcome == "failed":
                    deadline = 0.0  # do not wait: the other ranks may be blocked in a collective
                elif outcome == "refused":
                    deadline = min(deadline, time.monotonic() + REPORT_SECONDS)
        if failure is None:
            return [outcomes[rank][1] for rank in range(self.size)]
        if [outcome for outcome, _ in outcomes.values()] != ["refused"] * self.size:
            self.close()
        raise RankFailed(failure)

    def close(self) -> None:
        """Terminate the processes, and kill those that have not exited within 5 s."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        on_gpu = torch.cuda.device_count() >= self.size
        common = dict(os.environ) | ({} if on_gpu else CPU_ENVIRONMENT)
        common |= {"WORLD_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(self.size):
            ours, theirs = multiprocessing.Pipe()
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._processes.append(start_process(_serve, theirs, environment=environment, on_gpu=on_gpu))
            theirs.close()
            self._pipes.append(ours)


def _serve(pipe: Connection) -> None:
    """Join the process group, then run the functions from the pipe and send their outcomes, until the other end closes it.

    If this rank cannot join, send a "failed" outcome and return.
    """
    try:
        start(timeout_minutes=5)
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
        return
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        result: tuple[Outcome, Any]
        try:
            result = "returned", function(*args, **kwargs)
        except (UserError, PeerError):
            result = "refused", traceback.format_exc()
        except Exception:
            result = "failed", traceback.format_exc()
        pipe.send(result)
