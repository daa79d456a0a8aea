"""Timing helpers of the benchmarks: synchronization, clocks, and candidates timed in turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work; do nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device, wall: bool = False, barrier: bool = False) -> float:
    """Return the seconds that one call takes, including the work that it queues on a GPU.

    On a GPU the clock is wall-clock time. On a CPU it is the CPU time of all threads of this process, which is
    less affected by other programs.

    Args:
        run: function to call.
        device: device that `run` computes on.
        wall: whether to use wall-clock time on a CPU as well.
        barrier: whether to time from a barrier before the call to a barrier after it. Collective: every rank must call
            it.
    """
    clock = time.perf_counter if wall or device.type != "cpu" else time.process_time
    synchronize(device)
    if barrier:
        dist.barrier()
    started = clock()
    run()
    synchronize(device)
    if barrier:
        dist.barrier()
    return clock() - started


def time_in_turns(
    names: Sequence[str], turns: int, time_once: Callable[[str], float], rounds: int = 1
) -> dict[str, list[float]]:
    """Time candidates in turns, so that a change in the machine's speed affects all of them equally.

    Args:
        names: candidates to time; `time_once` gets one of these names.
        turns: number of timed turns; one warm-up turn comes first.
        time_once: function that runs a candidate and returns the seconds of a run.
        rounds: number of calls of `time_once` per candidate and timed turn; the smallest result is kept.

    Returns:
        Name of a candidate -> its seconds in each timed turn, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        runs: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(rounds if turn else 1):
            # Shuffle: in a fixed order, each candidate would always find the caches as the same other candidate left
            # them. The shuffle is seeded because all ranks must run the same candidate at the same time.
            for name in random.Random(turn * rounds + repeat).sample(names, len(names)):
                runs[name].append(time_once(name))
        if turn:
            for name in names:
                seconds[name].append(min(runs[name]))
    return seconds
