"""The reason for a recommendation, in words: what every other choice would cost or lack."""

from __future__ import annotations

from collections.abc import Sequence

from ldmole_dist.study.plan.choose import Line, neighbours, smaller

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


def reasons(line: Line, lines: Sequence[Line]) -> list[str]:
    """One sentence for each thing that was chosen."""
    near = neighbours(line, lines)
    sentences = [
        f"it takes {gb(line.total)} of the {gb(line.machine.usable)} that are usable, and of the lines that fit "
        "its step is the shortest (or within 2 % of it, and simpler)"
    ]
    if "ep_size" in near:
        sentences.append(_spreading(line, near["ep_size"]))
    if "checkpointing" in near:
        sentences.append(_recomputing(line, near["checkpointing"]))
    if "stage" in near:
        sentences.append(_stage(line, near["stage"]))
    if "offload" in near:
        sentences.append(_offloading(line, near["offload"]))
    return sentences


def experts_cost(line: Line) -> float:
    """Bytes on a GPU that belong to experts: parameters, and their share of gradients and optimizer."""
    memory = line.memory
    share = memory["experts"] / max(memory["experts"] + memory["adapter"], 1)
    return memory["experts"] + share * (memory["gradients"] + memory["optimizer"])


def _spreading(line: Line, other: Line) -> str:
    mine, theirs = experts_cost(line), experts_cost(other)
    a, b = line.strategy.ep_size, other.strategy.ep_size
    if a == 1:
        saved = f"spreading them over {b} ranks would save {gb(mine - theirs)}, which is not needed, and "
        if other.step > line.step:
            saved += f"a step would take {_longer(other, line)}"
        else:
            saved += "a step would not be noticeably shorter"
        return f"ep_size 1: experts take {gb(mine)} with their gradients and moments on every rank; {saved}"
    if not other.fits:
        return f"ep_size {a}: experts take {gb(mine)} a rank; with ep_size {b} {missing(other)} would be missing"
    return f"ep_size {a}: experts take {gb(mine)} a rank; with ep_size {b} a step would take {_longer(other, line)}"


def _recomputing(line: Line, other: Line) -> str:
    if not line.strategy.checkpointing:
        fit = "fits as well, but " if other.fits else "does not fit, and "
        return (
            f"no gradient checkpointing: {gb(line.memory['activations'])} of activations have room; recomputing them {fit}"
            f"takes {_longer(other, line)} a step"
        )
    if other.fits:
        return f"gradient checkpointing: without it a step would take {_longer(other, line)}"
    return (
        f"gradient checkpointing: without it activations are {gb(other.memory['activations'])} instead of "
        f"{gb(line.memory['activations'])}, and {missing(other)} would be missing"
    )


def _stage(line: Line, other: Line) -> str:
    a, b = line.strategy.stage, other.strategy.stage
    if not other.fits:
        return f"ZeRO {a}: with ZeRO {b} {missing(other)} would be missing"
    more = "more" if other.total >= line.total else "less"
    return f"ZeRO {a}: ZeRO {b} would take {gb(abs(other.total - line.total))} {more} memory, and a step {_longer(other, line)}"


def _offloading(line: Line, other: Line) -> str:
    if line.strategy.offload == "none":
        return f"nothing offloaded: offloading ({other.strategy.offload}) would make a step take {_longer(other, line)}"
    without = f"a step would take {_longer(other, line)}" if other.fits else f"{missing(other)} would be missing"
    return f"offloading {line.strategy.offload}: without it {without}; it needs {host_needed(line)}"


def _longer(slow: Line, fast: Line) -> str:
    ratio = slow.step / fast.step - 1
    if abs(ratio) < 0.005:
        return "as long"
    return f"{abs(ratio):.0%} {'longer' if ratio > 0 else 'less'}"


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
