"""Output of `ldmole plan` as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ldmole_dist.planner.candidates import Candidate, Machine
from ldmole_dist.planner.memory import PARTS
from ldmole_dist.planner.reasons import gb, missing, reasons
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.workload import Workload

MAX_ROWS = 8
HEADS = ("backb", "expert", "adapt", "grads", "optim", "activ", "work", "gather", "bucket")
OFFLOADS = {"none": "-", "optimizer": "optim", "optimizer+params": "opt+par"}
MIN_ELEMENTS = 5000  # fewer elements would be printed as 0.00 million


def report(
    name: str, workload: Workload, machine: Machine, candidates: Sequence[Candidate], show_all: bool
) -> Iterator[str]:
    """Yield the lines of the text output.

    Args:
        name: Name of the backbone.
        workload: Workload of the candidates.
        machine: Machine of the candidates.
        candidates: Candidates in the order of the table, the recommended one first.
        show_all: Whether to list all candidates. If False, list at most `MAX_ROWS`: those that fit, or others if none fits.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    others = [candidate for candidate in candidates if not candidate.fits]
    yield from _assumptions(name, workload, machine)
    yield ""
    yield "GB per GPU by part; traffic, FLOPs and time per rank and optimizer step:"
    yield from _table(candidates if show_all else fitting[:MAX_ROWS] or others[:MAX_ROWS])
    if not show_all and len(fitting) > MAX_ROWS:
        yield f"... and {len(fitting) - MAX_ROWS} more that fit (--all)"
    if not show_all and fitting and others:
        yield f"{len(others)} do not fit: {missing(others[0])} to {missing(others[-1])} missing (--all)"
    if fitting:
        best = fitting[0]
        yield f"\nrecommended: {best.name}"
        yield from (f"  - {reason}" for reason in reasons(best, candidates))
        yield from _details(best)


def _assumptions(name: str, workload: Workload, machine: Machine) -> Iterator[str]:
    w, m, shapes = workload, machine, shapes_of(workload)
    sequences = w.micro_batch * w.accumulation * m.gpus
    host = "" if m.host_memory is None else f"; {gb(m.host_memory)} of host memory per node"
    yield (
        f"{name}: {shapes.frozen():,} frozen parameters, {shapes.experts():,} in experts (E={w.num_experts}, "
        f"r={w.lora_rank}), {shapes.dense():,} in routers and lambda-MLPs"
    )
    yield f"machine: {m.gpus:,} x {gb(m.memory)}, {gb(m.usable)} usable ({m.reserved:.0%} reserved){host}"
    precision = w.precision if w.quantization is None else f"{w.precision}, linears in {w.quantization}"
    yield f"step: {precision}, {w.micro_batch} x {w.seq} tokens x {w.accumulation} micro-batches, {sequences:,} sequences"
    yield (
        f"assumed: {w.active:g} active experts per token{'' if w.dense else ', balanced'}; logits at "
        f"{w.answer_tokens or w.seq} positions per sequence; {'padding' if w.padded else 'no padding'}"
    )
    yield (
        f"assumed rates: {m.tflops:g} TFLOP/s, {m.bandwidth:g} GB/s within {m.gpus_per_node} GPUs, {m.inter_bandwidth:g} GB/s "
        f"between nodes, {m.host_bandwidth:g} GB/s to host memory, {m.latency:g} us per collective; no overlap"
    )


def _table(candidates: Sequence[Candidate]) -> Iterator[str]:
    heads = " ".join(f"{head:>6}" for head in HEADS)
    yield (
        f"{'ZeRO':>4} {'ep':>3} {'recompute':9} {'offload':8} | {heads} | {'GB':>7} {'sent GB':>8} {'TFLOP':>8} {'s/step':>7}"
    )
    for c in candidates:
        s = c.strategy
        parts = " ".join(_cell(c.memory[part]) for part in PARTS)
        yield (
            f"{s.stage:>4} {s.ep_size:>3} {'yes' if s.checkpointing else 'no':9} {OFFLOADS[s.offload]:8} | {parts} | "
            f"{c.total_bytes / 1e9:7.1f} {c.bytes_sent / 1e9:8.2f} {sum(c.flops.values()) / 1e12:8.1f} {c.step_seconds:7.2f}"
            + ("" if c.fits else f"  {missing(c)} missing")
        )


def _cell(size: int) -> str:
    return f"{size / 1e9:6.2f}" if 0 < size < 99.95e9 else f"{size / 1e9:6.0f}" if size else f"{'-':>6}"


def _details(candidate: Candidate) -> Iterator[str]:
    seconds = " + ".join(f"{name} {value:.2f}" for name, value in candidate.seconds.items() if value)
    yield f"  time per step: {candidate.step_seconds:.2f} s = {seconds}"
    total = sum(candidate.flops.values())
    yield "  FLOPs: " + ", ".join(f"{part} {value / total:.1%}" for part, value in candidate.flops.items() if value)
    sent = {kind: value / 1e6 for kind, value in candidate.elements_sent.items() if value >= MIN_ELEMENTS}
    if sent:
        yield "  sent per rank, million elements: " + ", ".join(f"{kind} {value:,.2f}" for kind, value in sent.items())


def as_json(name: str, workload: Workload, machine: Machine, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return the content of `--json`; "recommended" is the first candidate with its reasons, or None if it does not fit."""
    shapes, best = shapes_of(workload), candidates[0]
    settings = {key: value for key, value in vars(workload).items() if key not in ("backbone", "lora_rank", "_key")}
    return {
        "backbone": name,
        "parameters": {"frozen": shapes.frozen(), "experts": shapes.experts(), "adapter": shapes.dense()},
        "workload": settings | {"rank": workload.lora_rank},
        "machine": vars(machine) | {"usable": machine.usable},
        "lines": [_as_dict(candidate) for candidate in candidates],
        "recommended": _as_dict(best) | {"reasons": reasons(best, candidates)} if best.fits else None,
    }


def _as_dict(candidate: Candidate) -> dict[str, Any]:
    return {
        "strategy": dict(vars(candidate.strategy)) | {"deepspeed": candidate.strategy.deepspeed},
        "fits": candidate.fits,
        "bytes": candidate.memory,
        "total_bytes": candidate.total_bytes,
        "host_bytes": candidate.host_bytes,
        "host_bytes_of_node": candidate.host_bytes_per_node,
        "elements_sent": candidate.elements_sent,
        "bytes_sent": candidate.bytes_sent,
        "flops": candidate.flops,
        "seconds": candidate.seconds,
        "step_seconds": candidate.step_seconds,
    }
