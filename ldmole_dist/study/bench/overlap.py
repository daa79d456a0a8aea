"""Frozen linears that compute while rows and experts travel, against waiting first: part of `ldmole bench dispatch`.

A decoder layer's linears (all widths d) with their adapters, forward and backward, both ways in turns in one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.method.layer import Dispatch
from ldmole_dist.method.routers import Routing
from ldmole_dist.parallel.dispatch import ExpertParallel, Mode
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.dispatch import GROUPS, LayerInputs, Sizes, layer_inputs, synchronize

MODES: tuple[Mode, ...] = ("all_to_all", "auto")


class Overlap(NamedTuple):
    """Median seconds with and without overlap, and the median ratio of the pairs."""

    overlapped: float
    waiting: float
    faster: float


def measure_overlap(sizes: Sizes, mode: Mode, turns: int, dtype: torch.dtype) -> Overlap:
    """Run both ways on this rank and its peers; every rank calls it."""
    process = start()
    group = expert_parallel(process.world_size).group
    layer = [layer_inputs(sizes, g, linears, dtype, process.device) for g, linears in enumerate(GROUPS)]
    frozen_DO = torch.randn(sizes.features, sizes.features, dtype=dtype, device=process.device) / sizes.features**0.5
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns + 1):
        for overlap in (True, False):
            dispatch = ExpertParallel(group, mode, overlap).dispatch()
            dist.barrier()
            begun = time.perf_counter()
            for inputs in layer:
                _forward_backward(inputs, dispatch, frozen_DO)
            synchronize(process.device)
            dist.barrier()
            if turn:  # the first warms up
                times[overlap].append(time.perf_counter() - begun)
    faster = statistics.median(w / o for o, w in zip(times[True], times[False], strict=True))
    return Overlap(statistics.median(times[True]), statistics.median(times[False]), faster)


def _forward_backward(inputs: LayerInputs, dispatch: Dispatch, frozen_DO: Tensor) -> None:
    x_TD, p = inputs.x_TD.requires_grad_(), [weights.requires_grad_() for weights in inputs.p]
    decision = dispatch.decide([weights != 0 for weights in p], inputs.held, "layer")
    finish = dispatch.start(x_TD, [Routing(weights, weights, weights[:, 0]) for weights in p], inputs.held, decision)
    frozen = [x_TD @ frozen_DO]  # the group's first linear computes in between, the others follow (method.layer)
    deltas = finish()
    frozen += [x_TD @ frozen_DO for _ in p[1:]]
    torch.stack([((y + delta) * inputs.dy_TO).sum() for y, delta in zip(frozen, deltas, strict=True)]).sum().backward()


def bench_overlap(
    ranks: Sequence[int] = (2, 4), sizes: Sizes | None = None, turns: int = 5, dtype: torch.dtype = torch.float32
) -> dict[tuple[int, Mode], Overlap]:
    """Measure on groups of ranks of this machine; see `bench_dispatch.bench_dispatch` for the arguments."""
    table = {}
    for number in ranks:
        with LocalRanks(number) as processes:
            for mode in MODES:
                table[number, mode] = processes.run(measure_overlap, sizes or Sizes(), mode, turns, dtype)[0]
    return table


def print_overlap(table: dict[tuple[int, Mode], Overlap]) -> None:
    """Print what `bench_overlap` measured."""
    print(f"\n{'frozen linears included':30} {'overlapped ms':>13} {'waiting ms':>10} {'faster':>7}")
    for (ranks, mode), o in table.items():
        print(f"P={ranks} {mode:26} {1e3 * o.overlapped:13.1f} {1e3 * o.waiting:10.1f} {o.faster:7.2f}")
