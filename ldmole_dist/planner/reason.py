"""The reason for a recommendation, in words: what every other choice would cost or lack."""

from __future__ import annotations

from collections.abc import Sequence

from ldmole_dist.planner.choose import Line, neighbours, smaller

GB = 1e9


def gb(size: float) -> str:
    """As in "3.1 GB"."""
    value = size / GB
    return f"{value:,.0f} GB" if abs(value) >= 100 else f"{value:.1f} GB" if abs(value) >= 0.1 else f"{value:.2f} GB"


def missing(line: Line) -> str:
    """What a line lacks, as in "3.1 GB" or "40 GB of host memory a node"."""
    if line.host_lacks <= 0:
        return gb(line.lacks)
    host = f"{gb(line.host_lacks)} of host memory a node"
    return f"{gb(line.lacks)} and {host}" if line.lacks > 0 else host


def host_needed(line: Line) -> str:
    """As in "90 GB of the 1,000 GB of host memory a node"."""
    have = line.machine.host_memory
    if have is None:
        return f"{gb(line.host_of_node)} of host memory a node, which is not checked (--host-memory)"
    return f"{gb(line.host_of_node)} of the {gb(have)} of host memory a node"


def count(number: int, thing: str) -> str:
    """As in "1 GPU", "1,024 GPUs", "2 micro-batches"."""
    plural = thing + ("es" if thing.endswith("ch") else "s")
    return f"{number:,} {thing if number == 1 else plural}"


def reasons(line: Line, lines: Sequence[Line]) -> list[str]:
    """One sentence for each thing that was chosen."""
    near = neighbours(line, lines)
    sentences = [
        f"it takes {gb(line.total)} of the {gb(line.machine.usable)} that are usable, and {_quickest(line, lines)}"
    ]
    words = {"ep_size": _spreading, "checkpointing": _recomputing, "stage": _stage, "offload": _offloading}
    return sentences + [say(line, near[thing]) for thing, say in words.items() if thing in near]


def _quickest(line: Line, lines: Sequence[Line]) -> str:
    fitting = [other for other in lines if other.fits]
    shortest = min(fitting, key=lambda other: other.step)
    if len(fitting) == 1:
        return "no other line fits"
    if line.step <= shortest.step:
        return f"of the {len(fitting)} lines that fit none has a shorter step"
    return f"its step is as short as that of {shortest.name()}, within 2 %, and it is simpler or smaller"


def experts_cost(line: Line) -> float:
    """Bytes on a GPU that belong to experts: parameters, and their share of gradients and optimizer."""
    memory = line.memory
    share = memory["experts"] / max(memory["experts"] + memory["adapter"], 1)
    return memory["experts"] + share * (memory["gradients"] + memory["optimizer"])


def _spreading(line: Line, other: Line) -> str:
    a, b = line.strategy.ep_size, other.strategy.ep_size
    mine, saved = gb(experts_cost(line)), experts_cost(line) - experts_cost(other)
    text = f"ep_size {a}: experts take {mine} a rank with their gradients and moments; with ep_size {b} "
    if not other.fits:
        return f"{text}{missing(other)} would be missing"
    memory = f"{gb(abs(saved))} {'less' if saved > 0 else 'more'}"
    return f"{text}they would take {memory}, and a step {_longer(other, line)}"


def _recomputing(line: Line, other: Line) -> str:
    if not line.strategy.checkpointing:
        room = f"no gradient checkpointing: {gb(line.memory['activations'])} of activations have room"
        return f"{room}; with it a step would take {_longer(other, line)}"
    if other.fits:
        more = gb(other.total - line.total)
        return f"gradient checkpointing: without it a step would take {_longer(other, line)}, and {more} more memory"
    return (
        f"gradient checkpointing: without it activations are {gb(other.memory['activations'])} instead of "
        f"{gb(line.memory['activations'])}, and {missing(other)} would be missing"
    )


def _stage(line: Line, other: Line) -> str:
    a, b = line.strategy.stage, other.strategy.stage
    if not other.fits:
        closest = ", the closest of the lower stages," if b < a and a > 1 else ""
        return f"ZeRO {a}: with ZeRO {b}{closest} {missing(other)} would be missing"
    more = other.total - line.total
    memory = f"{gb(abs(more))} {'more' if more > 0 else 'less'} memory" if more else "the same memory"
    return f"ZeRO {a}: ZeRO {b} would take {memory}, and a step {_longer(other, line)}"


def _offloading(line: Line, other: Line) -> str:
    if line.strategy.offload == "none":
        what = other.strategy.offload
        return f"nothing offloaded: there is room; with {what} offloaded a step would take {_longer(other, line)}"
    without = f"a step would take {_longer(other, line)}" if other.fits else f"{missing(other)} would be missing"
    return f"offloading {line.strategy.offload}: without it {without}; it needs {host_needed(line)}"


def _longer(slow: Line, fast: Line) -> str:
    ratio = slow.step / fast.step - 1
    if abs(ratio) < 0.005:
        return "as long"
    return f"{abs(ratio):.0%} {'more' if ratio > 0 else 'less'} time"


def nothing_fits(closest: Line) -> str:
    """What the closest line lacks and what would help."""
    memory, machine = closest.memory, closest.machine
    needs = []
    if closest.lacks > 0:
        largest = sorted(memory, key=memory.__getitem__, reverse=True)[:3]
        parts = ", ".join(f"{part} {gb(memory[part])}" for part in largest)
        needs.append(f"{gb(closest.total)} a GPU: {gb(closest.lacks)} more ({parts})")
    if closest.host_lacks > 0:
        needs.append(f"{gb(closest.host_of_node)} of host memory a node: {gb(closest.host_lacks)} more")
    host = "" if machine.host_memory is None else f" and {gb(machine.host_memory)} of host memory a node"
    text = f"no line fits into {gb(machine.usable)} a GPU{host}. The closest, {closest.name()}, needs {', and '.join(needs)}."
    knobs = smaller(closest)
    advice = f"It would fit with {'; or with '.join(knobs)}" if knobs else "No smaller setting alone would make it fit"
    return f"{text} {advice}"
