"""Ranks on this machine: processes that have joined a group and run the functions they are sent.

The selftest, the benchmarks and the tests use them; a training run is started by a launcher instead.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from ldmole_dist.distributed import free_port
from ldmole_dist.engine.startup import start

_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


class RankFailed(RuntimeError):
    """A function failed, or did not return, on one of the ranks."""


class LocalRanks:
    """`size` processes joined into one group, one per GPU where there are that many, else on the CPU with one thread each.

    A failure or a time-out ends all of them; the next `run` starts new ones.

    Args:
        size: number of ranks.
        timeout: seconds that one `run` may take.
    """

    def __init__(self, size: int, timeout: float = 300.0) -> None:
        self.size, self.timeout = size, timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank.

        Args:
            function: importable by name; arguments and result can be pickled.

        Returns:
            The results, by rank.

        Raises:
            RankFailed: with the traceback of the rank that failed first.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        deadline = time.monotonic() + self.timeout
        results: dict[int, Any] = {}
        while len(results) < self.size:
            ready: list[Any] = multiprocessing.connection.wait(
                self._pipes, timeout=max(0.0, deadline - time.monotonic())
            )
            if not ready:
                self.close()
                missing = sorted(set(range(self.size)) - set(results))
                raise RankFailed(f"{function.__name__}: ranks {missing} did not return within {self.timeout:.0f} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                if rank in results:
                    continue
                try:
                    ok, results[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):  # the latter where it had not read all that it was sent
                    ok, results[rank] = False, "the process ended"
                if not ok:
                    self.close()
                    raise RankFailed(f"{function.__name__} failed on rank {rank}:\n{results[rank]}")
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
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
        spawn = multiprocessing.get_context("spawn")
        port = free_port()
        with _environment(_CPU if torch.cuda.device_count() < self.size else {}), _deaf_to_interrupts():
            for rank in range(self.size):
                ours, theirs = spawn.Pipe()
                process = spawn.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes started within: DeepSpeed chooses its device when it is imported, before `_serve`."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal: those started within leave it to this one, which ends them."""
    multiprocessing.resource_tracker.ensure_running()  # started later, it would undo the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        start(timeout_minutes=5)
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **kwargs)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
