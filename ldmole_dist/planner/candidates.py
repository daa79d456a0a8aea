"""Candidate strategies with their memory and step time, and the choice between them."""

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
from ldmole_dist.planner.traffic import bytes_sent, collective_calls, collectives, dispatch_elements, elements_sent
from ldmole_dist.planner.workload import SHIPPED, Strategy, Workload
from ldmole_dist.planner.zero import param_groups, shard_elements

SIMILAR = 1.02  # step times within this factor are treated as equal, and the simpler candidate is preferred
ADAM_PASSES = 7  # reads and writes of a float32 shard in host memory by one update of the offloaded Adam
SETTINGS = ("ep_size", "checkpointing", "stage", "offload")  # fields of `Strategy` in which candidates differ


@dataclass(frozen=True)
class Machine:
    """Hardware of a run: GPUs, memory, and rates of computation and communication.

    The default rates are assumptions; replace them with measured ones.

    Args:
        gpus: Number of GPUs, which is the world size.
        memory: Bytes per GPU.
        reserved: Fraction of the GPU memory to keep free for the CUDA context, the communication library and fragmentation.
        gpus_per_node: GPUs per node; the ranks of a node are consecutive.
        tflops: Achieved TFLOP/s per rank.
        bandwidth: GB/s that a rank sends within a node.
        inter_bandwidth: GB/s that a rank sends to other nodes.
        host_bandwidth: GB/s between device and host memory.
        latency: Microseconds per collective.
        host_memory: Bytes of host memory per node; None skips the check.

    Raises:
        UserError: If `reserved` is not in [0, 1), or a number of GPUs, `memory`, `tflops` or a bandwidth is not positive and
            finite.
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
                raise UserError(f"{name}={getattr(self, name)} must be positive and finite.")
        if not 0 <= self.reserved < 1:
            raise UserError(f"reserved={self.reserved} must be in [0, 1); set --reserve to a fraction such as 0.1.")

    @property
    def usable(self) -> int:
        """Bytes per GPU that a training step may use."""
        return int(self.memory * (1 - self.reserved))

    def bytes_per_second(self, span: int, ranks: int) -> float:
        """Return the bandwidth of one rank in a collective, in bytes per second.

        Args:
            span: Number of ranks from the first to the last rank of the group, including ranks outside of the group.
            ranks: Number of ranks in the group.
        """
        # If the span does not divide the GPUs of a node, some of the groups contain ranks of two nodes.
        in_node = span <= self.gpus_per_node and self.gpus_per_node % span == 0
        single_node = self.gpus <= self.gpus_per_node
        return 1e9 * (self.bandwidth if in_node or single_node or ranks == 1 else self.inter_bandwidth)


@dataclass(frozen=True)
class Candidate:
    """A strategy for a workload on a machine, with the estimates of memory, traffic, FLOPs and step time."""

    workload: Workload
    strategy: Strategy
    machine: Machine

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes per GPU at the peak of a step, by part; the parts are those of `memory.memory`."""
        return memory(self.workload, self.strategy)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes per GPU at the peak of a step."""
        return sum(self.memory.values())

    @property
    def missing_bytes(self) -> int:
        """Bytes per GPU beyond the usable memory; 0 or less if the usable memory suffices."""
        return self.total_bytes - self.machine.usable

    @cached_property
    def host_bytes(self) -> int:
        """Bytes of host memory that offloading takes per rank."""
        return sum(host_memory(self.workload, self.strategy).values())

    @property
    def host_bytes_per_node(self) -> int:
        """Bytes of host memory that offloading takes for all ranks of a node."""
        return self.host_bytes * min(self.machine.gpus, self.machine.gpus_per_node)

    @property
    def missing_host_bytes(self) -> int:
        """Bytes per node beyond the host memory; 0 or less if the host memory suffices, 0 if it is not checked."""
        return 0 if self.machine.host_memory is None else self.host_bytes_per_node - self.machine.host_memory

    @property
    def fits(self) -> bool:
        """Whether a step fits into the usable GPU memory and, if the host memory is known, into the host memory."""
        return self.missing_bytes <= 0 and self.missing_host_bytes <= 0

    @cached_property
    def elements_sent(self) -> dict[str, float]:
        """Number of elements that one rank sends in an optimizer step, by kind."""
        return elements_sent(self.workload, self.strategy)

    @cached_property
    def bytes_sent(self) -> float:
        """Bytes that one rank sends in an optimizer step."""
        return sum(bytes_sent(self.workload, self.strategy).values())

    @cached_property
    def flops(self) -> dict[str, float]:
        """FLOPs of one rank in an optimizer step, by part."""
        return flops(self.workload, self.strategy)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of an optimizer step for "compute", "wire" (communication) and "host" (offload), assuming no overlap."""
        w, s, m = self.workload, self.strategy, self.machine
        sizes = bytes_sent(w, s)
        wire = sum(sizes[kind] for kind in dispatch_elements(w, s)) / m.bytes_per_second(s.ep_size, s.ep_size)
        for c in collectives(w, s):
            # Of these collectives, only the all-reduce of the gradient norm can run in the expert-parallel group, which
            # consists of consecutive ranks. The groups of all others are treated as spanning all ranks.
            span = s.ep_size if c.ranks == s.ep_size and c.kind == "norm" else s.ranks
            width = sizes[c.kind] / self.elements_sent[c.kind] if self.elements_sent[c.kind] else 0
            wire += c.sent * width / m.bytes_per_second(span, c.ranks)
        wire += sum(collective_calls(w, s).values()) * m.latency * 1e-6
        return {"compute": sum(self.flops.values()) / (m.tflops * 1e12), "wire": wire, "host": self._host_seconds()}

    def _host_seconds(self) -> float:
        """Return the seconds of offloading per optimizer step.

        This counts the gradients (copied to the host once per micro-batch, and back for each micro-batch after the first), the
        updated parameters (copied to the device), the passes of Adam over host memory and, with offloaded parameters, a copy of
        this rank's shards to the device for every fetch in forward and backward.
        """
        w, s = self.workload, self.strategy
        if s.offload == "none":
            return 0.0
        gradients = 2 * w.accumulation - 1
        shards = sum(shard_elements(group, s.stage) for group in param_groups(w, s))
        copied: float = shards * 4 * (gradients + 1 + ADAM_PASSES)
        if s.offload == "optimizer+params":
            for fetch in gathers(w, s):
                if not fetch.kind.startswith("update"):
                    copied += fetch.elements / fetch.ranks * (w.itemsize if fetch.kind == "gather" else 4)
        return copied / (self.machine.host_bandwidth * 1e9)

    @property
    def step_seconds(self) -> float:
        """Seconds of an optimizer step, the sum of `seconds`."""
        return sum(self.seconds.values())

    @property
    def name(self) -> str:
        """Description such as "ZeRO 2, ep_size 1, gradient checkpointing"."""
        s = self.strategy
        parts = [f"ZeRO {s.stage}", f"ep_size {s.ep_size}"]
        parts += [f"dispatch {s.dispatch}"] if s.ep_size > 1 and s.dispatch != "auto" else []
        parts += ["gradient checkpointing" if s.checkpointing else "no gradient checkpointing"]
        return ", ".join(parts + ([f"{s.offload} offloaded"] if s.offload != "none" else []))


def all_candidates(workload: Workload, machine: Machine) -> list[Candidate]:
    """Return a candidate for every supported combination of the settings in `SETTINGS`."""
    sizes = [p for p in range(1, workload.num_experts + 1) if machine.gpus % p == 0 and workload.num_experts % p == 0]
    return [
        Candidate(workload, Strategy(machine.gpus, stage, ep_size, "auto", checkpointing, offload), machine)
        for stage, offload in SHIPPED
        for ep_size in sizes
        for checkpointing in (False, True)
        if not (workload.precision == "fp16" and stage == 0) and not (workload.quantization is not None and stage == 3)
    ]


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates in order of preference.

    Candidates that fit come first, by step time; candidates within a factor SIMILAR of the shortest step time are sorted by
    simplicity, then by memory, instead. Candidates that do not fit follow, by the sum of missing GPU and host memory.
    """
    fitting = sorted((c for c in candidates if c.fits), key=lambda c: c.step_seconds)
    similar = [c for c in fitting if c.step_seconds <= SIMILAR * fitting[0].step_seconds]
    others = [c for c in candidates if not c.fits]
    return [
        *sorted(similar, key=_complexity),
        *fitting[len(similar) :],
        *sorted(others, key=lambda c: max(c.missing_bytes, 0) + max(c.missing_host_bytes, 0)),
    ]


def _complexity(candidate: Candidate) -> tuple[bool, int, int, int]:
    s = candidate.strategy
    # Stages 0 to 2, and both values of checkpointing, are equally simple: prefer the candidate with the most free memory.
    return s.offload != "none", s.ep_size, s.stage == 3, candidate.total_bytes


def alternatives(candidate: Candidate, candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Return, for each of `SETTINGS` that can be changed alone, the best candidate that differs in that setting only.

    A change of the offload may include the stage that its shipped config needs. For the ZeRO stage, stages above the
    candidate's are considered only if no lower stage is available.
    """
    found: dict[str, Candidate] = {}
    for setting in SETTINGS:
        others = [other for other in candidates if _differences(candidate.strategy, other.strategy) == {setting}]
        if setting == "stage":
            others = [other for other in others if other.strategy.stage < candidate.strategy.stage] or others
        if others:
            found[setting] = best_first(others)[0]
    return found


def _differences(a: Strategy, b: Strategy) -> set[str]:
    settings = {name for name in SETTINGS if getattr(a, name) != getattr(b, name)}
    # The shipped offload configs fix the stage, so a change of both is treated as a change of the offload.
    return {"offload"} if settings == {"offload", "stage"} else settings


def changes_that_fit(candidate: Candidate) -> list[str]:
    """Return options of `ldmole plan` that each make a candidate fit, such as "--seq 512".

    If GPU memory is missing, sizes (micro-batch, answer tokens, sequence length) are halved until the candidate fits. At ZeRO
    stages 1 to 3, the number of GPUs is doubled until the candidate fits, at most five times. Precision fp32 is replaced by
    bf16. If no single option suffices, GPU memory is missing and the micro-batch is larger than 1, each option is combined with
    `--micro-batch 1`.

    Returns:
        Command-line options; empty if none suffices.
    """
    found = _sufficient(candidate, candidate.workload)
    if found or candidate.workload.micro_batch == 1 or candidate.missing_bytes <= 0:
        return found
    smallest = replace(candidate.workload, micro_batch=1)
    return [f"--micro-batch 1 {option}" for option in _sufficient(candidate, smallest)]


def _sufficient(candidate: Candidate, w: Workload) -> list[str]:
    """Return the options that each make the candidate fit with the workload `w`, each with the first value that suffices."""
    answers, gpus = w.answer_tokens or w.seq, candidate.machine.gpus
    options: list[list[tuple[str, Workload, int]]] = []
    if candidate.missing_bytes > 0:  # these options only reduce activations, which are in GPU memory
        options += [
            [(f"--micro-batch {n}", replace(w, micro_batch=n), gpus) for n in _halves(w.micro_batch)],
            [(f"--answer-tokens {n}", replace(w, answer_tokens=n), gpus) for n in _halves(answers)],
            [(f"--seq {n}", replace(w, seq=n, answer_tokens=min(n, answers)), gpus) for n in _halves(w.seq)],
        ]
    if w.precision == "fp32":
        options.append([("--precision bf16", replace(w, precision="bf16"), gpus)])
    if candidate.strategy.stage:
        options.append([(f"--gpus {gpus * n}", w, gpus * n) for n in (2, 4, 8, 16, 32)])

    def fits(value: tuple[str, Workload, int]) -> bool:
        _, workload, ranks = value
        machine = replace(candidate.machine, gpus=ranks)
        return Candidate(workload, replace(candidate.strategy, ranks=ranks), machine).fits

    found = []
    for values in options:
        # The memory decreases along `values`, so after the first value that fits, all others fit too.
        first = bisect_left(values, True, key=fits)
        if first < len(values):
            found.append(values[first][0])
    return found


def _halves(number: int) -> list[int]:
    return [number >> shift for shift in range(1, number.bit_length())]
