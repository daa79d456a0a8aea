"""The doctor's checks: each looks at what was found on a host, gives a cell of the table, and says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MEMORY_GB, DISK_GB = 2, 1  # a rank, a host: with less, not even a small run gets far
SKEW_SECONDS = 2.0


@dataclass(frozen=True)
class Facts:
    """What the checks look at.

    Attributes:
        found: by `probe.look` on this host.
        usual: what most hosts have, by the same names.
        slots: ranks of this host.
        devices: that it must have for the slots that were chosen.
        ranks: of the job.
        hosts: of the job.
        skew: seconds that its clock is ahead.
        shared: "yes"; "no" where this host does not see a file that the first has made; or the error.
    """

    found: Mapping[str, Any]
    usual: Mapping[str, Any]
    slots: int
    devices: int
    ranks: int
    hosts: int
    skew: float
    shared: str


Finding = tuple[str, str | None]  # the cell; what is wrong and the remedy


def _packages(facts: Facts) -> Finding:
    usual = facts.usual["packages"]
    others = {name: version for name, version in facts.found["packages"].items() if usual.get(name) != version}
    if not others:
        return "same", None
    cell = ", ".join(f"{name} {version}" for name, version in others.items())
    elsewhere = ", ".join(f"{name} {usual.get(name, 'none')}" for name in others)
    return (
        cell,
        f"has {cell}, the others {elsewhere}: install the same versions (bash launch/setup_env.sh on each host)",
    )


def _code(facts: Facts) -> Finding:
    code = facts.found["code"]
    differs = code != facts.usual["code"]
    return code[:7], "its ldmole_dist differs from that of the others: check out the same commit" if differs else None


def _config(facts: Facts) -> Finding:
    config = facts.found["config"]
    if config == "missing":
        return config, "the config is not there: put it where all hosts see it, or copy it"
    differs = config != facts.usual["config"]
    return (config or "-")[:7], "its config differs from that of the others: copy it" if differs else None


def _memory(facts: Facts) -> Finding:
    memory = facts.found["memory"] / 2**30
    short = memory < MEMORY_GB * facts.slots
    wrong = f"{memory:.1f} GB of memory are free for {facts.slots} rank(s): end what takes it, or give it fewer slots"
    return f"{memory:.0f} GB", wrong if short else None


def _disk(facts: Facts) -> Finding:
    disk = facts.found["disk"] / 2**30
    wrong = f"{disk:.2f} GB are free where run.output_dir is: make room, or choose another"
    return f"{disk:.0f} GB", wrong if disk < DISK_GB else None


def _gpus(facts: Facts) -> Finding:
    gpus = facts.found["gpus"]
    if not gpus:
        wrong = (
            "has no GPU, other hosts do: check its driver (nvidia-smi), or exclude it" if facts.usual["gpus"] else None
        )
        return "none", wrong
    few = f"has {len(gpus)} GPU(s), {facts.devices} are wanted: correct its line in the hostfile"
    return f"{len(gpus)} x {gpus[0]}", few if len(gpus) < facts.devices else None


def _network(facts: Facts) -> Finding:
    name, address = facts.found["interface"], facts.found["address"]
    cell = f"{name} {address or 'has no address'}"
    if facts.hosts == 1:
        return cell, None
    there = ", ".join(
        f"{name} ({own})" for name, own in facts.found["interfaces"].items() if not own.startswith("127.")
    )
    remedy = f"choose one with --interface: there are {there or 'none'}"
    if facts.found["network_problem"]:
        return cell, f"{facts.found['network_problem']}: have its name resolved on every host (DNS, /etc/hosts)"
    if address is None:
        return cell, f"has no network interface {name!r} with an IPv4 address; {remedy}"
    if address.startswith("127."):
        return cell, f"interface {name} ({address}) is not reachable from other hosts; {remedy}"
    return cell, None


def _operators(facts: Facts) -> Finding:
    ops = facts.found["ops"]
    return ops, f"{ops}: install that, or choose optimisation.optimizer=adamw" if ops.startswith("cannot") else None


def _clock(facts: Facts) -> Finding:
    if facts.skew != facts.skew:
        return "?", "stopped answering while it was looked at: look at its load and memory"
    wrong = f"its clock is {facts.skew:+.1f} s off: synchronise it (chrony, systemd-timesyncd)"
    return f"{facts.skew * 1e3:+.0f} ms", wrong if abs(facts.skew) > SKEW_SECONDS else None


def _limits(facts: Facts) -> Finding:
    files, needed = facts.found["files"], 1024 + 64 * facts.ranks
    if 0 <= files < needed:
        return str(files), f"a process may open {files} files: ulimit -Hn {needed} or more (/etc/security/limits.conf)"
    if facts.found["locked"]:
        return "locked", "memory for InfiniBand cannot be locked: ulimit -l unlimited (/etc/security/limits.conf)"
    return str(files), None


def _shared(facts: Facts) -> Finding:
    if facts.shared == "yes":
        return "yes", None
    if facts.shared == "no":
        return (
            "no",
            "run.output_dir there is not the folder that the first host sees: put it on a file system that all share",
        )
    return "?", f"run.output_dir cannot be used: {facts.shared}: make it writable, or choose another"


CHECKS: dict[str, Callable[[Facts], Finding]] = {
    "packages": _packages,
    "code": _code,
    "config": _config,
    "memory": _memory,
    "disk": _disk,
    "GPUs": _gpus,
    "network": _network,
    "operators": _operators,
    "clock": _clock,
    "open files": _limits,
    "output shared": _shared,
}
