"""Checks of `ldmole doctor`.

Each check takes the `HostFacts` of one host, and returns a table cell and, if the check fails, a problem with its remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MIN_MEMORY_GB_PER_RANK, MIN_DISK_GB = 2, 1  # minimum for a small run
MAX_CLOCK_SKEW_SECONDS = 2.0


@dataclass(frozen=True)
class HostFacts:
    """Input of the checks for one host.

    Attributes:
        found: result of `probe.inspect_host` on this host.
        majority: most frequent value of each key of `found` over the hosts that answered; for "packages", of each package.
        slots: number of ranks on this host.
        devices: number of devices that the selected slots need: the largest slot number plus 1.
        ranks: number of ranks of the job.
        hosts: number of hosts of the job.
        clock_skew: seconds by which the clock of this host is ahead of the launching host; NaN if the host stopped answering.
        output_shared: whether this host shares run.output_dir with the first host that answered, which creates a file in it:
            "yes" or "no" if this host sees the file or not; "not checked" if the first host could not create the file or one
            of the two hosts stopped answering; the error message if this host could not access the folder.
    """

    found: Mapping[str, Any]
    majority: Mapping[str, Any]
    slots: int
    devices: int
    ranks: int
    hosts: int
    clock_skew: float
    output_shared: str


CheckResult = tuple[str, str | None]  # (table cell, problem with its remedy or None)


def _packages(facts: HostFacts) -> CheckResult:
    majority = facts.majority["packages"]
    different = {name: version for name, version in facts.found["packages"].items() if majority.get(name) != version}
    if not different:
        return "same", None
    cell = ", ".join(f"{name} {version}" for name, version in different.items())
    elsewhere = ", ".join(f"{name} {majority.get(name, 'missing')}" for name in different)
    return (
        cell,
        f"has {cell}, but other hosts have {elsewhere}: install the same versions (.venv/bin/python -m pip install "
        "NAME==VERSION)",
    )


def _code(facts: HostFacts) -> CheckResult:
    code = facts.found["code"]
    problem = "its ldmole_dist differs from that of other hosts: check out the same commit"
    return code[:7], problem if code != facts.majority["code"] else None


def _config(facts: HostFacts) -> CheckResult:
    config = facts.found["config"]
    if config == "missing":
        return config, "the config file does not exist on this host: copy it, or move it to a shared file system"
    problem = "its config file differs from that of other hosts: copy the same file to all hosts"
    return (config or "-")[:7], problem if config != facts.majority["config"] else None


def _memory(facts: HostFacts) -> CheckResult:
    memory = facts.found["memory"] / 2**30
    short = memory < MIN_MEMORY_GB_PER_RANK * facts.slots
    needed = MIN_MEMORY_GB_PER_RANK * facts.slots
    problem = (
        f"{memory:.1f} GB of memory is free, but {facts.slots} rank(s) need at least {needed} GB: end other processes, or "
        "start fewer ranks on this host"
    )
    return f"{memory:.0f} GB", problem if short else None


def _disk(facts: HostFacts) -> CheckResult:
    disk = facts.found["disk"] / 2**30
    problem = (
        f"{disk:.2f} GB of disk space is free at run.output_dir, but at least {MIN_DISK_GB} GB is needed: delete files, or "
        "move run.output_dir to another disk"
    )
    return f"{disk:.0f} GB", problem if disk < MIN_DISK_GB else None


def _gpus(facts: HostFacts) -> CheckResult:
    gpus = facts.found["gpus"]
    if not gpus:
        problem = "has no GPU, but other hosts do: check its driver (nvidia-smi), or leave it out with --exclude"
        return "none", problem if facts.majority["gpus"] else None
    problem = f"has {len(gpus)} GPU(s), but its slots need {facts.devices}: use only slots 0 to {len(gpus) - 1}"
    return f"{len(gpus)} x {gpus[0]}", problem if len(gpus) < facts.devices else None


def _network(facts: HostFacts) -> CheckResult:
    name, address = facts.found["interface"], facts.found["address"]
    cell = f"{name} {address or 'without address'}"
    if facts.hosts == 1:
        return cell, None
    candidates = ", ".join(
        f"{name} ({own})" for name, own in facts.found["interfaces"].items() if not own.startswith("127.")
    )
    remedy = f"set --interface to one of: {candidates}" if candidates else "connect the host to a network"
    if facts.found["network_problem"]:
        return cell, f"{facts.found['network_problem']}: add the name to DNS or /etc/hosts, or {remedy}"
    if address is None:
        return cell, f"has no network interface {name!r} with an IPv4 address: {remedy}"
    if address.startswith("127."):
        return cell, f"interface {name} ({address}) is not reachable from other hosts: {remedy}"
    return cell, None


def _operators(facts: HostFacts) -> CheckResult:
    ops = facts.found["ops"]
    problem = f"DeepSpeed's optimizer {ops}: install what is missing, or set optimisation.optimizer=adamw"
    return ops, problem if ops.startswith("cannot") else None


def _clock(facts: HostFacts) -> CheckResult:
    if math.isnan(facts.clock_skew):
        return "?", "stopped answering during the checks: check its load and memory"
    problem = (
        f"its clock differs by {facts.clock_skew:+.1f} s from that of the launching host: synchronize it (chrony or "
        "systemd-timesyncd)"
    )
    return f"{facts.clock_skew * 1e3:+.0f} ms", problem if abs(facts.clock_skew) > MAX_CLOCK_SKEW_SECONDS else None


def _limits(facts: HostFacts) -> CheckResult:
    # Allow each rank 64 connections per rank of the job, and 1024 files for libraries and data. RLIM_INFINITY is negative.
    limit, needed = facts.found["open_files"], 1024 + 64 * facts.ranks
    if 0 <= limit < needed:
        problem = f"a process can open {limit} files, but {needed} are needed: raise the hard limit (/etc/security/limits.conf)"
        return str(limit), problem
    if facts.found["memory_lock_limited"]:
        return "locked", "cannot lock memory for InfiniBand: set ulimit -l unlimited (/etc/security/limits.conf)"
    return str(limit), None


def _output_shared(facts: HostFacts) -> CheckResult:
    if facts.output_shared == "yes":
        return "yes", None
    if facts.output_shared == "no":
        return "no", "its run.output_dir is not shared with the first host: choose a folder on a shared file system"
    if facts.output_shared == "not checked":
        return "?", None  # `_clock`, or the problem of the first host, gives the reason
    return "?", f"cannot use run.output_dir: {facts.output_shared}: make it writable, or choose another folder"


# Check for each column of the table; the column "host" has none.
CHECKS: dict[str, Callable[[HostFacts], CheckResult]] = {
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
    "output shared": _output_shared,
}
