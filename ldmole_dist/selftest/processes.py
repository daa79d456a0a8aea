"""Start processes for ranks on this machine. Processes on the CPU are forked from a server that has imported the package.

Importing torch, DeepSpeed, transformers and PEFT takes a rank about 5 s of CPU time; forking a rank takes about 0.1 s.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch

# DeepSpeed chooses its device when it is imported, so these variables must be set before.
CPU_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# Disables the thread pools of OpenMP, OpenBLAS (NumPy) and the tokenizers, because threads do not survive a fork.
_SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# Modules that the fork server imports. The server starts with the first process; later changes have no effect.
preload = [
    "ldmole_dist.cli",
    "ldmole_dist.training.run",
    "ldmole_dist.selftest.cases",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    # DeepSpeed 0.19.8 imports these when it builds its first engine; the last one imports torch._inductor.
    "deepspeed.runtime.zero.stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.original_muon",
]


def start_process(
    target: Callable[..., None], *args: Any, environment: Mapping[str, str], on_gpu: bool = False, daemon: bool = True
) -> BaseProcess:
    """Start a process and return it.

    The new process blocks SIGINT until `target` unblocks the signal, and exits when its parent exits.

    Args:
        target: function to run. It must be importable by name, and its arguments must be picklable.
        args: arguments of `target`.
        environment: environment variables of the new process; it inherits no others.
        on_gpu: whether the process uses a GPU. It is then spawned, because CUDA does not survive a fork.
        daemon: whether `multiprocessing` terminates the process when its parent exits. A daemonic process cannot start
            processes with `multiprocessing`.
    """
    with _interrupts_blocked():
        if on_gpu:
            context: Any = multiprocessing.get_context("spawn")
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(preload)
            with _environment(CPU_ENVIRONMENT | _SINGLE_THREADED):
                multiprocessing.forkserver.ensure_running()
        process: BaseProcess = context.Process(
            target=_enter, args=(dict(environment), on_gpu, target, args), daemon=daemon
        )
        with _environment(environment):
            process.start()
    return process


def _enter(environment: dict[str, str], on_gpu: bool, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Prepare a new process and call `target(*args)`."""
    # A forked process inherits the environment of the fork server, not that of the parent.
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # its own child processes use the default again
    if not on_gpu:
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    target(*args)


def _exit_with_parent() -> None:
    """Wait until the parent has exited, even if it was killed, then exit this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Context manager that sets environment variables within its block and restores their previous values."""
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
def _interrupts_blocked() -> Iterator[None]:
    """Context manager that blocks SIGINT in the processes that are started within its block.

    Ctrl-C in a terminal sends SIGINT to this process and to all processes that it started. Only this process handles the
    signal, and then ends the others.
    """
    multiprocessing.resource_tracker.ensure_running()  # start it first, because its start unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
