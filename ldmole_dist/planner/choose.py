"""Which of all strategies fit, how long a step of each would take at given rates, and which one to take."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ldmole_dist.errors import UserError
from ldmole_dist.planner.flops import flops
from ldmole_dist.planner.gathering import gathers
from ldmole_dist.planner.memory import host_memory, memory
from ldmole_dist.planner.traffic import collectives, dispatched, messages, traffic, traffic_bytes
from ldmole_dist.planner.workload import SHIPPED, Strategy, Workload
from ldmole_dist.planner.zero import piece, shards

SIMILAR = 1.02  # a step that takes so much longer is no reason for a more complicated line


@dataclass(frozen=True)
class Machine:
    """What the ranks run on; the defaults are assumptions to be replaced by what was measured.

    Args:
        gpus: in all.
        memory: bytes of each.
        reserved: share of it for context, communication library and fragmentation.
        gpus_per_node: consecutive ranks that are in one host.
        tflops: that a rank achieves, of its peak; 1e12 a second.
        bandwidth: GB a second that a rank sends within a host.
        inter_bandwidth: to another host.
        host_bandwidth: between device and host memory.
        latency: microseconds that a collective takes beyond its bytes.
        host_memory: bytes of a host; None where that is not to be checked.
    """

    gpus: int
    memory: int
    reserved: float = 0.1
    gpus_per_node: int = 8
    tflops: float = 150.0
    bandwidth: float = 150.0
    inter_bandwidth: float = 20.0
    host_bandwidth: float = 20.0
    latency: float = 20.0
    host_memory: int | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "memory", "gpus_per_node", "tflops", "bandwidth", "inter_bandwidth", "host_bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be above 0 and finite")
        if not 0 <= self.reserved < 1:
            raise UserError(f"reserved={self.reserved} must lie in [0, 1)")

    @property
    def usable(self) -> int:
        """Bytes of a GPU that a step may take."""
        return int(self.memory * (1 - self.reserved))

    def speed(self, consecutive: int, of: int) -> float:
        """Bytes a second of a group of `of` ranks that lie `consecutive` ranks apart from its first to its last."""
        inside = consecutive <= self.gpus_per_node and self.gpus_per_node % consecutive == 0
        return 1e9 * (self.bandwidth if inside or self.gpus <= self.gpus_per_node or of == 1 else self.inter_bandwidth)


@dataclass(frozen=True)
class Line:
    """One strategy, with what it takes."""

    workload: Workload
    strategy: Strategy
    machine: Machine

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes on a GPU by part."""
        return memory(self.workload, self.strategy)

    @cached_property
    def host(self) -> int:
        """Bytes in host memory for each rank."""
        return sum(host_memory(self.workload, self.strategy).values())

    @cached_property
    def total(self) -> int:
        """Bytes on a GPU."""
        return sum(self.memory.values())

    @property
    def lacks(self) -> int:
        """Bytes that are missing on a GPU; 0 or less if it fits."""
        return self.total - self.machine.usable

    @property
    def host_of_node(self) -> int:
        """Bytes in host memory for all ranks of a node."""
        return self.host * min(self.machine.gpus, self.machine.gpus_per_node)

    @property
    def host_lacks(self) -> int:
        """Bytes that are missing in host memory; 0 or less if it fits, or is not checked."""
        return 0 if self.machine.host_memory is None else self.host_of_node - self.machine.host_memory

    @property
    def fits(self) -> bool:
        """Whether a step fits into the usable memory, and into the host's if that is known."""
        return self.lacks <= 0 and self.host_lacks <= 0

    @cached_property
    def traffic(self) -> dict[str, float]:
        """Elements that a rank sends, by kind."""
        return traffic(self.workload, self.strategy)

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of a rank, by part."""
        return flops(self.workload, self.strategy)

    @cached_property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return sum(traffic_bytes(self.workload, self.strategy).values())

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of an optimizer step: "compute", "wire" and "host", added up as if nothing overlapped."""
        w, s, m = self.workload, self.strategy, self.machine
        sizes = traffic_bytes(w, s)
        wire = sum(sizes[kind] for kind in dispatched(w, s)) / m.speed(s.ep_size, s.ep_size)
        for c in collectives(w, s):
            # Ranks of a smaller group than all are neighbours, or one of each group of neighbours.
            across = s.ep_size if c.ranks == s.ep_size and c.kind == "norm" else s.ranks
            width = sizes[c.kind] / self.traffic[c.kind] if self.traffic[c.kind] else 0
            wire += c.sent * width / m.speed(across, c.ranks)
        wire += sum(messages(w, s).values()) * m.latency * 1e-6
        return {"compute": sum(self.flops.values()) / (m.tflops * 1e12), "wire": wire, "host": self._host_seconds()}

    def _host_seconds(self) -> float:
        """Gradients out, and in again where another micro-batch is added to them; updated parameters in, and Adam's seven
        passes over float32 in host memory; with offloaded parameters, this rank's pieces in for every fetch."""
        w, s = self.workload, self.strategy
        if s.offload == "none":
            return 0.0
        gradients = 2 * w.accumulation - 1
        moved: float = sum(piece(shard, s.stage) for shard in shards(w, s)) * 4 * (gradients + 1 + 7)
        if s.offload == "optimizer+params":
            for fetch in gathers(w, s):
                if not fetch.kind.startswith("update"):
                    moved += fetch.elements / fetch.ranks * (w.itemsize if fetch.kind == "gather" else 4)
        return moved / (self.machine.host_bandwidth * 1e9)

    @property
    def step(self) -> float:
        """Seconds of an optimizer step."""
        return sum(self.seconds.values())

    def name(self) -> str:
        """As in "ZeRO 2, ep_size 1, gradient checkpointing"."""
        s = self.strategy
        parts = [f"ZeRO {s.stage}", f"ep_size {s.ep_size}"]
        parts += [f"dispatch {s.dispatch}"] if s.ep_size > 1 and s.dispatch != "auto" else []
        parts += ["gradient checkpointing" if s.checkpointing else "no gradient checkpointing"]
        return ", ".join(parts + ([f"{s.offload} offloaded"] if s.offload != "none" else []))


def all_lines(workload: Workload, machine: Machine) -> list[Line]:
    """Every ZeRO stage, expert-parallel size, gradient checkpointing and offload that can run."""
    sizes = [p for p in range(1, workload.num_experts + 1) if machine.gpus % p == 0 and workload.num_experts % p == 0]
    return [
        Line(workload, Strategy(machine.gpus, stage, ep_size, "auto", checkpointing, offload), machine)
        for stage, offload in SHIPPED
        for ep_size in sizes
        for checkpointing in (False, True)
        if not (workload.precision == "fp16" and stage == 0)
    ]


def ordered(lines: Sequence[Line]) -> list[Line]:
    """Those that fit by the time of a step, the simpler first where that is alike; then the others by what they lack."""
    fitting = sorted((line for line in lines if line.fits), key=lambda line: line.step)
    if fitting:
        alike = [line for line in fitting if line.step <= SIMILAR * fitting[0].step]
        alike.sort(key=_complication)
        fitting = alike + fitting[len(alike) :]
    return fitting + sorted((line for line in lines if not line.fits), key=_short)


def _short(line: Line) -> int:
    return max(line.lacks, 0) + max(line.host_lacks, 0)


def _complication(line: Line) -> tuple[bool, int, int, int]:
    s = line.strategy
    # Of stages 0 to 2 the one that leaves most room; the lower of two that leave the same.
    return s.offload != "none", s.ep_size, s.stage == 3, line.total


def neighbours(line: Line, lines: Sequence[Line]) -> dict[str, Line]:
    """The best line that differs from this one in one thing only, by that thing."""
    found: dict[str, Line] = {}
    for thing in ("checkpointing", "ep_size", "stage", "offload"):
        others = [other for other in lines if _differs_in(line.strategy, other.strategy) == {thing}]
        if thing == "stage":
            others = [o for o in others if o.strategy.stage < line.strategy.stage] or others
        if others:
            found[thing] = ordered(others)[0]
    return found


def _differs_in(a: Strategy, b: Strategy) -> set[str]:
    things = {t for t in ("checkpointing", "ep_size", "stage", "offload") if getattr(a, t) != getattr(b, t)}
    # Offloading goes with a stage of its own file.
    return {"offload"} if things == {"offload", "stage"} else things


def smaller(line: Line) -> list[str]:
    """What would make a line fit that does not: the mildest value of each single setting that suffices; where none does, of
    each together with the smallest micro-batch."""
    single = _sufficient(line, line.workload, "")
    if single or line.workload.micro_batch == 1 or line.lacks <= 0:
        return single
    return _sufficient(line, replace(line.workload, micro_batch=1), "--micro-batch 1 and ")


def _sufficient(line: Line, w: Workload, before: str) -> list[str]:
    answers = w.answer_tokens or w.seq
    knobs: list[list[tuple[str, Workload, int]]] = [
        [("--precision bf16", replace(w, precision="bf16"), 1)] if w.precision == "fp32" else [],
        [(f"--gpus {line.machine.gpus * n}", w, n) for n in (2, 4, 8, 16, 32)] if line.strategy.stage else [],
    ]
    if line.lacks > 0:  # activations are never in host memory
        knobs[:0] = [
            [(f"--micro-batch {n}", replace(w, micro_batch=n), 1) for n in _halved(w.micro_batch)],
            [
                (f"--answer-tokens {n} if no more positions have a label", replace(w, answer_tokens=n), 1)
                for n in _halved(answers)
            ],
            [(f"--seq {n}", replace(w, seq=n, answer_tokens=min(n, answers)), 1) for n in _halved(w.seq)],
        ]
    found = []
    for values in knobs:
        # Each is smaller than the one before.
        first = bisect_left(values, True, key=lambda value: _fits(line, value[1], value[2]))
        if first < len(values):
            found.append(before + values[first][0])
    return found


def _fits(line: Line, workload: Workload, times: int) -> bool:
    machine = replace(line.machine, gpus=line.machine.gpus * times)
    return Line(workload, replace(line.strategy, ranks=machine.gpus), machine).fits


def _halved(number: int) -> list[int]:
    found = []
    while number > 1:
        number //= 2
        found.append(number)
    return found
