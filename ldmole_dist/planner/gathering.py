"""When ZeRO-3 gathers which weight: DeepSpeed's parameter coordinator, played through on the modules' order.

A weight is fetched before a module that uses it, ahead of time if it is among the next `stage3_prefetch_bucket_size` elements,
and released after the module unless it is used again within `stage3_max_reuse_distance` elements. Weights of at most
`stage3_param_persistence_threshold` elements are never released, and gathered anew after each update.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ldmole_dist.planner.hooks import Event, module_order
from ldmole_dist.planner.shapes import Parameter, shapes_of
from ldmole_dist.planner.workload import Strategy, Workload
from ldmole_dist.planner.zero import local_elements, settings


class Gather(NamedTuple):
    """Fetches of one kind over `ranks`, in an optimizer step: all-gathers where there are several."""

    kind: str
    ranks: int
    elements: int
    calls: int


class Gathering(NamedTuple):
    """What is gathered in a micro-batch and after the update, and the most bytes that are whole only for a time."""

    gathers: tuple[Gather, ...]
    peak: int


def gathers(workload: Workload, strategy: Strategy) -> tuple[Gather, ...]:
    """Fetches of an optimizer step at stage 3: "gather" frozen weights, "gather_adapter" dense trained ones,
    "gather_experts", and "update", the small ones after it."""
    found = gathering(*_relevant(workload, strategy)).gathers
    times = workload.accumulation
    # Small ones are gathered once, after the update.
    return tuple(
        g if g.kind.startswith("update") else g._replace(elements=g.elements * times, calls=g.calls * times)
        for g in found
    )


def gathered(workload: Workload, strategy: Strategy) -> int:
    """Bytes of weights that are whole at a time, at the most."""
    return gathering(*_relevant(workload, strategy)).peak


def _relevant(workload: Workload, strategy: Strategy) -> tuple[Workload, Strategy]:
    """Without what makes no difference here, so that nothing is played through twice."""
    return replace(workload, seq=16, micro_batch=1, accumulation=1, answer_tokens=None), replace(
        strategy, dispatch="auto"
    )


@lru_cache(maxsize=256)
def gathering(workload: Workload, strategy: Strategy) -> Gathering:
    """See `Gathering`."""
    coordinator = _Coordinator(workload, strategy)
    coordinator.micro_batch(module_order(workload, strategy.checkpointing).events)
    found = [Gather(*key, *numbers) for key, numbers in coordinator.gathered.items()]
    return Gathering((*found, *coordinator.updates()), coordinator.peak)


class _Coordinator:
    """DeepSpeed 0.19.8's PartitionedParameterCoordinator once it knows the order of the modules."""

    def __init__(self, workload: Workload, strategy: Strategy) -> None:
        zero = settings(strategy)
        self.itemsize, self.strategy = workload.itemsize, strategy
        self.reuse, self.prefetch = zero["stage3_max_reuse_distance"], zero["stage3_prefetch_bucket_size"]
        self.most = zero["stage3_max_live_parameters"]
        self.parameters = {p.name: p for p in shapes_of(workload).parameters}
        threshold = zero["stage3_param_persistence_threshold"]
        self.persistent = {name for name, p in self.parameters.items() if local_elements(p, strategy) <= threshold}
        self.order = module_order(workload, strategy.checkpointing)
        self.gathered: dict[tuple[str, int], tuple[int, int]] = {}
        self.available = set(self.persistent)
        self.bytes = self.peak = self.live = 0

    def micro_batch(self, events: Sequence[Event]) -> None:
        """Play one forward and backward through."""
        fetches = [event.module for event in events if event.what == "fetch"]
        ahead = _Ahead([self.uses(module) for module in fetches], [self._elements(m) for m in fetches])
        queue = deque((name, step) for step, module in enumerate(fetches) for name in self.uses(module))
        fetched_for = dict.fromkeys(self.parameters, -1)
        active: dict[str, set[str]] = {name: set() for name in self.parameters}
        recomputed: dict[str, set[str]] = {}
        in_backward: dict[str, None] = {}
        step = 0
        for event in events:
            own = self.uses(event.module)
            if event.what == "fetch":
                if not event.forward:
                    in_backward[event.module] = None
                self.gather([name for name in own if name not in self.available])
                for name in own:
                    active[name].add(event.module)
                    if event.recomputing and in_backward and not self.parameters[name].trainable:
                        recomputed.setdefault(next(reversed(in_backward)), set()).add(name)
                waiting = {name for name in own if fetched_for[name] < step}
                while queue and waiting:
                    name, last = queue.popleft()
                    fetched_for[name] = last
                    waiting.discard(name)
                self._prefetch(queue, fetched_for)
                step += 1
                continue
            release = {n for n in own if n not in self.persistent and fetched_for[n] <= step}
            release -= ahead.within(step, self.reuse, release)
            touched = set(own)
            if not event.forward:
                release |= {n for n in recomputed.get(event.module, ()) if n not in self.persistent}
                touched |= recomputed.pop(event.module, set())
                in_backward.pop(event.module, None)
            for name in touched:
                active[name].discard(event.module)
                if name in release and not active[name]:
                    self.release(name)
        self.release_all()

    def uses(self, module: str) -> tuple[str, ...]:
        """Parameters that a module uses itself, in the order of the model."""
        return self.order.uses.get(module, ())

    def _elements(self, module: str) -> int:
        return sum(local_elements(self.parameters[name], self.strategy) for name in self.uses(module))

    def _prefetch(self, queue: deque[tuple[str, int]], fetched_for: dict[str, int]) -> None:
        room, wanted, elements = min(self.most - self.live, self.prefetch), [], 0
        while self.prefetch and queue and elements < room:
            name, last = queue.popleft()
            fetched_for[name] = max(fetched_for[name], last)
            if name not in self.available and name not in wanted:
                wanted.append(name)
                elements += local_elements(self.parameters[name], self.strategy)
        self.gather(wanted)

    def gather(self, names: Sequence[str]) -> None:
        """One fetch: a collective for each group of ranks and, of several weights, each dtype."""
        batches: dict[tuple[str, int], list[Parameter]] = {}
        for name in names:
            p = self.parameters[name]
            batches.setdefault(self._kind(p), []).append(p)
            n = local_elements(p, self.strategy)
            self.available.add(name)
            self.live += n
            self.bytes += n * (4 if p.trainable else self.itemsize)
        self.peak = max(self.peak, self.bytes)
        seen: set[tuple[int, bool]] = set()
        for (kind, ranks), parameters in batches.items():
            together = ranks, kind == "gather"  # one collective for each group of ranks and dtype
            elements, calls = self.gathered.get((kind, ranks), (0, 0))
            new = together not in seen
            self.gathered[kind, ranks] = (elements + sum(map(self._padded, parameters)), calls + new)
            seen.add(together)

    def release(self, name: str) -> None:
        """A weight is in pieces again."""
        if name in self.available and name not in self.persistent:
            self.available.discard(name)
            p = self.parameters[name]
            n = local_elements(p, self.strategy)
            self.live -= n
            self.bytes -= n * (4 if p.trainable else self.itemsize)

    def release_all(self) -> None:
        """The micro-batch is over."""
        for name in list(self.available):
            self.release(name)

    def updates(self) -> list[Gather]:
        """The small ones after an update."""
        found: dict[tuple[str, int], tuple[int, int]] = {}
        for name in sorted(self.persistent):
            p = self.parameters[name]
            ranks = self._kind(p)[1]
            key = ("update_experts" if p.expert and self.strategy.ep_size > 1 else "update", ranks)
            elements, calls = found.get(key, (0, 0))
            found[key] = (elements + self._padded(p), calls + 1)
        return [Gather(*key, *value) for key, value in found.items()]

    def _kind(self, p: Parameter) -> tuple[str, int]:
        spread = p.expert and self.strategy.ep_size > 1
        kind = "gather_experts" if p.expert else "gather_adapter" if p.trainable else "gather"
        return kind, self.strategy.expert_copies if spread else self.strategy.ranks

    def _padded(self, p: Parameter) -> int:
        ranks = self._kind(p)[1]
        return math.ceil(local_elements(p, self.strategy) / ranks) * ranks


class _Ahead:
    """Which weights are used again soon."""

    def __init__(self, uses: list[tuple[str, ...]], elements: list[int]) -> None:
        self.uses = uses
        self.until = [0]
        for n in elements:
            self.until.append(self.until[-1] + n)
        self.steps: dict[str, list[int]] = {}
        for step, names in enumerate(uses):
            for name in names:
                self.steps.setdefault(name, []).append(step)

    def within(self, step: int, distance: int, names: set[str]) -> set[str]:
        """Those of `names` that a module from `step` on uses before `distance` elements have been passed."""
        found = set()
        for name in names:
            index = bisect_left(self.steps[name], step)
            following = self.steps[name][index] if index < len(self.steps[name]) else None
            if following is not None and self.until[following] - self.until[step] < distance:
                found.add(name)
        return found
