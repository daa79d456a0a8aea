"""Reasons for a recommendation: memory and step time of the candidate, and the effect of changing each setting."""

from __future__ import annotations

from collections.abc import Sequence

from ldmole_dist.planner.candidates import SIMILAR, Candidate, alternatives, changes_that_fit


def gb(size: float) -> str:
    """Format a number of bytes in units of 10^9, such as "3.1 GB"."""
    value = size / 1e9
    return f"{value:,.0f} GB" if abs(value) >= 100 else f"{value:.1f} GB" if abs(value) >= 0.1 else f"{value:.2f} GB"


def missing(candidate: Candidate) -> str:
    """Format the missing memory, such as "3.1 GB per GPU and 40.0 GB of host memory per node"; empty if none is missing."""
    parts = [f"{gb(candidate.missing_bytes)} per GPU"] if candidate.missing_bytes > 0 else []
    if candidate.missing_host_bytes > 0:
        parts.append(f"{gb(candidate.missing_host_bytes)} of host memory per node")
    return " and ".join(parts)


def reasons(best: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """Return the reasons for a recommendation as lines of text.

    The lines state the memory, the step time, with offload the host memory, and the effect of changing each setting alone.

    Args:
        best: Recommended candidate.
        candidates: All candidates.
    """
    machine = best.machine
    found = [
        f"memory: {gb(best.total_bytes)} of {gb(machine.usable)} usable per GPU",
        f"step: {_step(best, candidates)}",
    ]
    if best.strategy.offload != "none":
        limit = "not checked (--host-memory)" if machine.host_memory is None else f"of {gb(machine.host_memory)}"
        found.append(f"host memory: {gb(best.host_bytes_per_node)} per node, {limit}")
    for setting, other in alternatives(best, candidates).items():
        old, new = getattr(best.strategy, setting), getattr(other.strategy, setting)
        found.append(f"{setting} {_value(old)} -> {_value(new)}: {_effect(best, other)}")
    return found


def _step(best: Candidate, candidates: Sequence[Candidate]) -> str:
    fitting = [other for other in candidates if other.fits]
    shortest = min(fitting, key=lambda other: other.step_seconds)
    if len(fitting) == 1:
        return "only candidate that fits"
    if best.step_seconds <= shortest.step_seconds:
        return f"shortest of {len(fitting)} candidates that fit"
    return f"within {SIMILAR - 1:.0%} of the shortest ({shortest.name}), and simpler or smaller"


def _value(setting: object) -> str:
    return {True: "on", False: "off"}[setting] if isinstance(setting, bool) else str(setting)


def _effect(best: Candidate, other: Candidate) -> str:
    if not other.fits:
        return f"does not fit, {missing(other)} missing"
    size = other.total_bytes - best.total_bytes
    time = other.step_seconds / best.step_seconds - 1
    return f"memory {'-' if size < 0 else '+'}{gb(abs(size))}, step time {time:+.0%}"


def nothing_fits(closest: Candidate) -> str:
    """Return the error message for a search in which no candidate fits.

    Args:
        closest: Candidate with the least missing memory.
    """
    memory, machine = closest.memory, closest.machine
    host = "" if machine.host_memory is None else f" and {gb(machine.host_memory)} of host memory per node"
    largest = ", ".join(f"{part} {gb(memory[part])}" for part in sorted(memory, key=lambda part: -memory[part])[:3])
    changes = changes_that_fit(closest)
    remedy = f"Use one of: {'; '.join(changes)}." if changes else "No single option makes it fit; combine several."
    return (
        f"No candidate fits into {gb(machine.usable)} per GPU{host}. The closest is {closest.name}: {missing(closest)} missing "
        f"(largest parts of GPU memory: {largest}). {remedy}"
    )
