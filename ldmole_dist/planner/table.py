"""The plan as a person and as a machine reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ldmole_dist.planner.choose import Line, Machine
from ldmole_dist.planner.memory import PARTS
from ldmole_dist.planner.reason import count, gb, missing, reasons
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.workload import Workload

SHOWN = 8
HEADS = ("backb", "expert", "adapt", "grads", "optim", "activ", "work", "gather", "bucket")


def head(name: str, workload: Workload, machine: Machine) -> list[str]:
    """What is planned, and what is assumed."""
    w, m, shapes = workload, machine, shapes_of(workload)
    sequences = w.micro_batch * w.accumulation * m.gpus
    host = "" if m.host_memory is None else f"; {gb(m.host_memory)} of host memory a node"
    experts = "all, so that nothing is an expectation" if w.dense else f"{w.active:g} on average, no expert preferred"
    return [
        f"{name}: {shapes.frozen():,} frozen parameters, {shapes.experts():,} in experts (E={w.num_experts}, r={w.rank}), "
        f"{shapes.dense():,} in routers and lambda-MLPs",
        f"{count(m.gpus, 'GPU')} of {gb(m.memory)}, {gb(m.usable)} usable ({m.reserved:.0%} kept free for context, library and "
        f"fragmentation){host}; {w.precision}; {w.micro_batch} x {w.seq} tokens a forward, "
        f"{count(w.accumulation, 'micro-batch')} and {count(sequences, 'sequence')} a step",
        f"assumed: experts of a token: {experts}; logits of {w.answer_tokens or w.seq} positions a sequence; "
        f"{'padding, so that attention keeps a mask' if w.padded else 'no padding'}",
        f"assumed rates: {m.tflops:g} TFLOP/s achieved, {m.bandwidth:g} GB/s sent within {m.gpus_per_node} GPUs, "
        f"{m.inter_bandwidth:g} GB/s between nodes, {m.host_bandwidth:g} GB/s to host memory, {m.latency:g} us a collective; "
        "nothing overlaps",
    ]


def table(lines: Sequence[Line]) -> list[str]:
    """Rows of strategies with GB by part, what is sent, FLOPs and time."""
    rows = [
        f"{'ZeRO':>4} {'ep':>3} {'recompute':9} {'offload':8} | "
        + " ".join(f"{h:>6}" for h in HEADS)
        + f" | {'GB':>7} "
        f"{'sent GB':>8} {'TFLOP':>8} {'s/step':>7}"
    ]
    for line in lines:
        s = line.strategy
        offload = {"none": "-", "optimizer": "optim", "optimizer+params": "opt+par"}[s.offload]
        parts = " ".join(_cell(line.memory[part]) for part in PARTS)
        short = "" if line.fits else f"  lacks {missing(line)}"
        rows.append(
            f"{s.stage:>4} {s.ep_size:>3} {'yes' if s.checkpointing else 'no':9} {offload:8} | {parts} | "
            f"{line.total / 1e9:7.1f} {line.sent / 1e9:8.2f} {sum(line.flops.values()) / 1e12:8.1f} {line.step:7.2f}{short}"
        )
    return rows


def _cell(size: int) -> str:
    return f"{size / 1e9:6.2f}" if 0 < size < 99.95e9 else f"{size / 1e9:6.0f}" if size else f"{'-':>6}"


def report(name: str, workload: Workload, machine: Machine, lines: Sequence[Line], everything: bool) -> list[str]:
    """The whole text.

    Args:
        name: of the backbone.
        workload: that was planned.
        machine: it is to run on.
        lines: in the order to be shown, the recommended one first.
        everything: also what is far down, and what does not fit.
    """
    fitting = [line for line in lines if line.fits]
    others = [line for line in lines if not line.fits]
    text = [*head(name, workload, machine), ""]
    text += ["GB a GPU by part, and an optimizer step of one rank:"]
    text += table(lines if everything else fitting[:SHOWN] or others[:SHOWN])
    if not everything:
        if len(fitting) > SHOWN:
            text.append(f"... and {len(fitting) - SHOWN} more that fit (--all)")
        if fitting and others:
            text.append(
                f"{len(others)} lines do not fit, by {missing(others[0])} ({others[0].name()}) "
                f"to {missing(others[-1])} ({others[-1].name()})"
            )
    if fitting:
        best = fitting[0]
        text += ["", f"recommended: {best.name()}", *(f"  - {sentence}" for sentence in reasons(best, lines))]
        text += _detail(best)
    return text


def _detail(line: Line) -> Iterable[str]:
    seconds = " + ".join(f"{name} {value:.2f}" for name, value in line.seconds.items() if value)
    yield f"  a step: {line.step:.2f} s = {seconds} (at the assumed rates)"
    total = sum(line.flops.values())
    yield "  FLOPs: " + ", ".join(f"{part} {value / total:.1%}" for part, value in line.flops.items() if value)
    sent = {kind: value for kind, value in line.traffic.items() if value >= 5000}
    if sent:
        yield "  sent by a rank, million elements: " + ", ".join(
            f"{kind} {value / 1e6:,.2f}" for kind, value in sent.items()
        )


def as_json(name: str, workload: Workload, machine: Machine, lines: Sequence[Line]) -> dict[str, Any]:
    """The same for machines; the first line is the recommended one, if it fits."""
    return {
        "backbone": name,
        "parameters": {
            "frozen": shapes_of(workload).frozen(),
            "experts": shapes_of(workload).experts(),
            "adapter": shapes_of(workload).dense(),
        },
        "workload": {k: v for k, v in vars(workload).items() if k != "backbone"},
        "machine": vars(machine) | {"usable": machine.usable},
        "lines": [_line(line) for line in lines],
        "recommended": _line(lines[0]) | {"reasons": reasons(lines[0], lines)} if lines and lines[0].fits else None,
    }


def _line(line: Line) -> dict[str, Any]:
    return {
        "strategy": dict(vars(line.strategy)) | {"deepspeed": line.strategy.deepspeed},
        "fits": line.fits,
        "bytes": line.memory,
        "total_bytes": line.total,
        "host_bytes": line.host,
        "host_bytes_of_node": line.host_of_node,
        "elements_sent": line.traffic,
        "bytes_sent": line.sent,
        "flops": line.flops,
        "seconds": line.seconds,
        "step_seconds": line.step,
    }
