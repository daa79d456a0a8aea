"""Hosts of a job: hostfiles, Slurm allocations, selection of hosts, and placement of expert-parallel groups."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmole_dist.errors import UserError

SCONTROL_SECONDS = 60  # time for scontrol to answer


@dataclass(frozen=True)
class Host:
    """Host with the slots that the job uses.

    Attributes:
        name: name or address by which the other hosts reach it.
        slots: device numbers, one per rank.
    """

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: str) -> list[Host]:
    """Return the hosts of a hostfile with lines "NAME slots=N" and # comments, the format of DeepSpeed and Open MPI.

    Raises:
        UserError: if the file cannot be read, a line is invalid, a host is listed twice, or there is no host.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise UserError(
            f"cannot read hostfile {path}: {reason}; check --hostfile (launch/hostfile.example shows the format)"
        ) from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", entry)
        if match is None:
            raise UserError(f"{path}, line {number}: {entry!r} does not have the form 'NAME slots=N' with N >= 1")
        if any(match[1] == host.name for host in hosts):
            raise UserError(f"{path}, line {number}: host {match[1]} is already listed; sum its slots in one line")
        hosts.append(Host(match[1], tuple(range(int(match[2])))))
    if not hosts:
        raise UserError(f"hostfile {path} lists no host; add a line 'NAME slots=N' for each host")
    return hosts


def slurm_hosts(environ: Mapping[str, str]) -> list[Host]:
    """Return the hosts of the current Slurm allocation, with one slot per task.

    Raises:
        UserError: if SLURM_TASKS_PER_NODE is missing or malformed, if SLURM_JOB_NODELIST is missing, if the two variables
            differ in the number of nodes, or if `scontrol` cannot be started, fails, or takes more than SCONTROL_SECONDS.
    """
    tasks: list[int] = []
    tasks_per_node = environ.get("SLURM_TASKS_PER_NODE", "")
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)  # "8(x2),4" means 8, 8, 4
        if match is None:
            raise UserError(
                f"SLURM_TASKS_PER_NODE={tasks_per_node!r} does not set the number of ranks per node; set --nodes and "
                "--ntasks-per-node of sbatch or salloc, as launch/slurm.sbatch does"
            )
        tasks += [int(match[1])] * int(match[2] or 1)
    nodes = environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise UserError(
            "SLURM_JOB_NODELIST is not set; run this command inside the allocation, in its batch script or a shell of salloc"
        )
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        names = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=SCONTROL_SECONDS
        ).stdout.split()
    except OSError as error:
        raise UserError(f"cannot run scontrol: {error.strerror}; add its folder to PATH") from error
    except subprocess.SubprocessError as error:
        reason = f"no answer within {SCONTROL_SECONDS} s"
        if isinstance(error, subprocess.CalledProcessError):
            reason = error.stderr.strip() or f"exit code {error.returncode}"
        raise UserError(f"{' '.join(command)} failed: {reason}; check the value of SLURM_JOB_NODELIST") from error
    if len(names) != len(tasks):
        raise UserError(
            f"SLURM_TASKS_PER_NODE={tasks_per_node!r} is for {len(tasks)} nodes, but SLURM_JOB_NODELIST={nodes} names "
            f"{len(names)}; restore the values that Slurm set for the allocation"
        )
    return [Host(name, tuple(range(count))) for name, count in zip(names, tasks, strict=True)]


def select_hosts(hosts: Sequence[Host], include: str, exclude: str) -> list[Host]:
    """Return the selected hosts and slots, in the order of `hosts`.

    Args:
        hosts: hosts to select from.
        include: hosts and slots to use, "NAME[:SLOT,...]@..." as in DeepSpeed; "" for all.
        exclude: hosts and slots to leave out, in the same format.

    Raises:
        UserError: if a host or slot does not exist, the format is wrong, both arguments are set, or no slot remains.
    """
    if include and exclude:
        raise UserError("--include and --exclude are both set; set only one of them")
    option = "--include" if include else "--exclude"
    named = _parse_selection(option, include or exclude, {host.name: host for host in hosts})
    if include:
        kept = [Host(host.name, named[host.name]) for host in hosts if host.name in named]
    else:
        kept = [Host(h.name, tuple(slot for slot in h.slots if slot not in named.get(h.name, ()))) for h in hosts]
    kept = [host for host in kept if host.slots]
    if not kept:
        raise UserError(f"{option} {include or exclude} leaves no slot; change it so that at least one remains")
    return kept


def _parse_selection(option: str, text: str, hosts: Mapping[str, Host]) -> dict[str, tuple[int, ...]]:
    """Parse `text`, the value of `option` (--include or --exclude), and return the named slots by host.

    A host that is named without slots has all its slots.

    Raises:
        UserError: if a host or slot does not exist, or the format is wrong.
    """
    named: dict[str, tuple[int, ...]] = {}
    for part in filter(None, text.split("@")):
        name, _, numbers = part.partition(":")
        if name not in hosts:
            raise UserError(f"{option} {part}: there is no host {name!r}; choose from {', '.join(hosts)}")
        slots = hosts[name].slots
        if numbers:
            if not re.fullmatch(r"\d+(,\d+)*", numbers):
                raise UserError(f"{option} {part}: this does not have the form NAME[:SLOT,...]")
            slots = tuple(sorted({int(number) for number in numbers.split(",")}))
            unknown = [slot for slot in slots if slot not in hosts[name].slots]
            if unknown:
                last = hosts[name].slots[-1]
                raise UserError(f"{option} {part}: {name} has no slot {unknown[0]}; its slots are 0 to {last}")
        named[name] = slots
    return named


def order_for_groups(hosts: Sequence[Host], ep_size: int) -> list[Host]:
    """Return the hosts, sorted so that those whose number of slots is a multiple of `ep_size` come first.

    An expert-parallel group is `ep_size` consecutive ranks. A host whose number of slots is not a multiple shifts the groups of
    all hosts after it, so that groups there can span hosts.
    """
    return sorted(hosts, key=lambda host: len(host.slots) % ep_size != 0)


def describe_layout(hosts: Sequence[Host], ep_size: int) -> str:
    """Return one line with the ranks per host and the number of expert-parallel groups that span hosts."""
    counts = [len(host.slots) for host in hosts]
    host_of_rank = [number for number, count in enumerate(counts) for _ in range(count)]
    starts = range(0, len(host_of_rank), ep_size)
    spanning = sum(len(set(host_of_rank[start : start + ep_size])) > 1 for start in starts)
    ranks = f"{len(host_of_rank)} rank(s): " + ", ".join(
        f"{count} on {host.name}" for host, count in zip(hosts, counts, strict=True)
    )
    if ep_size == 1:
        return f"{ranks}; ep_size=1: each rank holds all experts"
    groups = f"{ranks}; expert-parallel groups of {ep_size} ranks: "
    if spanning == 0:
        return f"{groups}all {len(starts)} within a host"
    within = math.gcd(ep_size, *counts)
    return f"{groups}{spanning} of {len(starts)} span hosts (with ep_size={within} none would)"


def write_hostfile(hosts: Sequence[Host], path: Path) -> None:
    """Write a hostfile for a launcher, with the number of slots of each host."""
    path.write_text("".join(f"{host.name} slots={len(host.slots)}\n" for host in hosts))
