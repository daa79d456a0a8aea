"""Simulation of ZeRO-3's all-gathers: DeepSpeed's parameter coordinator, run on the recorded order of the modules.

A weight is fetched before a module that uses it, or earlier if it is among the next `stage3_prefetch_bucket_size` elements.
It is released after the module unless it is used again within `stage3_max_reuse_distance` elements. Weights with at most
`stage3_param_persistence_threshold` elements are never released; they are gathered after each update.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ldmole_dist.planner.module_order import Event, module_order
from ldmole_dist.planner.shapes import Parameter, shapes_of
from ldmole_dist.planner.workload import Strategy, Workload
from ldmole_dist.planner.zero import local_elements, settings


class Gather(NamedTuple):
    """Fetches of weights of one kind within one group of ranks. They are all-gathers if the group has several ranks.

    Args:
        kind: In forward and backward: "gather" (frozen weights), "gather_adapter" (routers and lambda-MLPs), "gather_experts".
            After an update, for persistent weights: "update_experts" (experts, with expert parallelism), "update" (all others).
        ranks: Number of ranks in the group.
        elements: Number of elements of the whole weights with padding, summed over all calls.
        calls: Number of calls; a call that fetches both experts and other trainable weights is counted in only one of the two
            kinds.
    """

    kind: str
    ranks: int
    elements: int
    calls: int


def gathers(workload: Workload, strategy: Strategy) -> tuple[Gather, ...]:
    """Return the fetches of an optimizer step at ZeRO stage 3."""
    n = workload.accumulation
    return tuple(
        g if g.kind.startswith("update") else g._replace(elements=g.elements * n, calls=g.calls * n)
        for g in _simulated(workload, strategy)[0]
    )


def gathered_bytes(workload: Workload, strategy: Strategy) -> int:
    """Return the peak size of the temporarily gathered weights, in bytes."""
    return _simulated(workload, strategy)[1]


def _simulated(workload: Workload, strategy: Strategy) -> tuple[tuple[Gather, ...], int]:
    # Reset the fields that do not change the fetches, to hit the cache.
    small = replace(workload, seq=16, micro_batch=1, accumulation=1, answer_tokens=None)
    return _simulate(small, replace(strategy, dispatch="auto"))


@lru_cache(maxsize=256)
def _simulate(workload: Workload, strategy: Strategy) -> tuple[tuple[Gather, ...], int]:
    """Return the fetches of one micro-batch and one update, and the peak size of the gathered weights in bytes."""
    coordinator = _Coordinator(workload, strategy)
    coordinator.micro_batch(module_order(workload, strategy.checkpointing).events)
    found = [Gather(*key, *numbers) for key, numbers in coordinator.gathered.items()]
    return (*found, *coordinator.updates()), coordinator.peak


class _Coordinator:
    """Simulation of DeepSpeed 0.19.8's PartitionedParameterCoordinator, after it has recorded the order of the modules."""

    def __init__(self, workload: Workload, strategy: Strategy) -> None:
        zero = settings(strategy)
        self.itemsize, self.strategy = workload.itemsize, strategy
        self.reuse, self.prefetch = zero["stage3_max_reuse_distance"], zero["stage3_prefetch_bucket_size"]
        self.max_live = zero["stage3_max_live_parameters"]
        self.parameters = {p.name: p for p in shapes_of(workload).parameters}
        threshold = zero["stage3_param_persistence_threshold"]
        self.persistent = {name for name, p in self.parameters.items() if local_elements(p, strategy) <= threshold}
        self.order = module_order(workload, strategy.checkpointing)
        self.gathered: dict[tuple[str, int], tuple[int, int]] = {}  # (kind, ranks) -> (elements, calls)
        self.available = set(self.persistent)
        self.bytes = self.peak = self.live = 0

    def micro_batch(self, events: Sequence[Event]) -> None:
        """Simulate one forward and backward."""
        fetches = [event.module for event in events if event.kind == "fetch"]
        next_uses = _NextUses([self.uses(m) for m in fetches], [self._elements(m) for m in fetches])
        queue = deque((name, step) for step, module in enumerate(fetches) for name in self.uses(module))
        fetched_for = dict.fromkeys(self.parameters, -1)  # weight -> index of the last module that it was fetched for
        active: dict[str, set[str]] = {name: set() for name in self.parameters}  # weight -> modules using it
        # module in backward -> frozen weights that a recomputation during its backward fetched
        recomputed: defaultdict[str, set[str]] = defaultdict(set)
        in_backward: dict[str, None] = {}  # modules whose backward is in progress, innermost last
        step = 0
        for event in events:
            own = self.uses(event.module)
            if event.kind == "fetch":
                if not event.forward:
                    in_backward[event.module] = None
                self.gather([name for name in own if name not in self.available])
                for name in own:
                    active[name].add(event.module)
                    if event.recomputing and in_backward and not self.parameters[name].trainable:
                        recomputed[next(reversed(in_backward))].add(name)
                waiting = {name for name in own if fetched_for[name] < step}
                while queue and waiting:
                    name, last = queue.popleft()
                    fetched_for[name] = last
                    waiting.discard(name)
                self._prefetch(queue, fetched_for)
                step += 1
                continue
            release = {n for n in own if n not in self.persistent and fetched_for[n] <= step}
            release -= next_uses.within(step, self.reuse, release)
            ended = set(own)
            if not event.forward:
                again = recomputed.pop(event.module, set())
                release |= again - self.persistent
                ended |= again
                in_backward.pop(event.module, None)
            for name in ended:
                active[name].discard(event.module)
                if name in release and not active[name]:
                    self.release(name)
        for name in list(self.available):
            self.release(name)

    def uses(self, module: str) -> tuple[str, ...]:
        """Return the names of the parameters that a module's hooks fetch, in the order of the model."""
        return self.order.uses.get(module, ())

    def _elements(self, module: str) -> int:
        return sum(local_elements(self.parameters[name], self.strategy) for name in self.uses(module))

    def _prefetch(self, queue: deque[tuple[str, int]], fetched_for: dict[str, int]) -> None:
        """Fetch the next weights of the queue, up to the prefetch size and the maximum number of live elements."""
        room, wanted, elements = min(self.max_live - self.live, self.prefetch), [], 0
        while self.prefetch and queue and elements < room:
            name, last = queue.popleft()
            fetched_for[name] = max(fetched_for[name], last)
            if name not in self.available and name not in wanted:
                wanted.append(name)
                elements += local_elements(self.parameters[name], self.strategy)
        self.gather(wanted)

    def gather(self, names: Sequence[str]) -> None:
        """Fetch weights together: for each group of ranks, one collective for frozen and one for trainable weights."""
        called: set[tuple[int, bool]] = set()
        # DeepSpeed flattens weights by group and data type. Experts and other trainable weights, all float32, share a
        # collective if their groups have the same ranks.
        kinds = dict.fromkeys(self._kind(self.parameters[name]) for name in names)
        for name in names:
            self._hold(name, +1)
        self.peak = max(self.peak, self.bytes)
        for kind, ranks in kinds:
            padded = sum(
                self._padded(p) for p in map(self.parameters.__getitem__, names) if self._kind(p) == (kind, ranks)
            )
            collective = ranks, kind == "gather"
            elements, calls = self.gathered.get((kind, ranks), (0, 0))
            self.gathered[kind, ranks] = (elements + padded, calls + (collective not in called))
            called.add(collective)

    def release(self, name: str) -> None:
        """Release a weight unless it is persistent."""
        if name in self.available and name not in self.persistent:
            self._hold(name, -1)

    def _hold(self, name: str, sign: int) -> None:
        """Update the available weights and the counters: add (`sign` = 1) or remove (`sign` = -1) a weight."""
        p = self.parameters[name]
        n = local_elements(p, self.strategy)
        self.available ^= {name}
        self.live += sign * n
        self.bytes += sign * n * (4 if p.trainable else self.itemsize)

    def updates(self) -> list[Gather]:
        """Return the gathers of persistent weights after an update."""
        found: dict[tuple[str, int], tuple[int, int]] = {}
        for name in sorted(self.persistent):
            p = self.parameters[name]
            ranks = self._kind(p)[1]
            key = ("update_experts" if p.expert and self.strategy.ep_size > 1 else "update", ranks)
            elements, calls = found.get(key, (0, 0))
            found[key] = (elements + self._padded(p), calls + 1)
        return [Gather(*key, *numbers) for key, numbers in found.items()]

    def _kind(self, p: Parameter) -> tuple[str, int]:
        """Return the kind of a weight's fetches in forward and backward (`Gather.kind`), and the size of its group of ranks."""
        kind = "gather_experts" if p.expert else "gather_adapter" if p.trainable else "gather"
        return kind, self.strategy.expert_copies if p.expert and self.strategy.ep_size > 1 else self.strategy.ranks

    def _padded(self, p: Parameter) -> int:
        """Return the number of elements of the whole weight, padded to equal shards on all ranks of its group."""
        ranks = self._kind(p)[1]
        return math.ceil(local_elements(p, self.strategy) / ranks) * ranks


class _NextUses:
    """Distance to the next use of each weight, in elements of the modules that are fetched in between."""

    def __init__(self, uses: list[tuple[str, ...]], elements: list[int]) -> None:
        self.until = [0]
        for n in elements:
            self.until.append(self.until[-1] + n)
        self.steps: defaultdict[str, list[int]] = defaultdict(list)
        for step, names in enumerate(uses):
            for name in names:
                self.steps[name].append(step)

    def within(self, step: int, distance: int, names: set[str]) -> set[str]:
        """Return the weights in `names` that are used again at or after `step`, within `distance` elements."""
        found = set()
        for name in names:
            index = bisect_left(self.steps[name], step)
            if index < len(self.steps[name]) and self.until[self.steps[name][index]] - self.until[step] < distance:
                found.add(name)
        return found
