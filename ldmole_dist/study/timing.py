"""Timing helpers that the benchmarks share: device synchronization, clocks and interleaved turns."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work; on a CPU, return at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device, wall: bool = False, barrier: bool = False) -> float:
    """Return the seconds that one call takes, including the work that it queues on a GPU.

    Args:
        run: the function to call.
        device: the device that it computes on.
        wall: whether to measure wall-clock time on a CPU too, instead of the CPU time of all threads, which leaves out
            other programs on the machine.
        barrier: whether all ranks wait for each other before and after the call.
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
    """Time several candidates in turns, so that a change in the machine's speed affects all of them alike.

    Args:
        names: the candidates.
        turns: timed turns, after one that warms up.
        time_once: runs the named candidate once and returns its seconds.
        rounds: runs of every candidate in a turn, of which the fastest counts.

    Returns:
        By name, the seconds of every timed turn in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        runs: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(rounds if turn else 1):
            # In a fixed order a candidate would always find the caches of the same predecessor. The order is seeded, since
            # all ranks must run the same candidate at the same time.
            for name in random.Random(turn * rounds + repeat).sample(names, len(names)):
                runs[name].append(time_once(name))
        if turn:
            for name in names:
                seconds[name].append(min(runs[name]))
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios within each turn."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
