"""The hosts of a job: hostfiles, choosing among them, and which expert-parallel groups stay within one."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmole_dist.errors import UserError


@dataclass(frozen=True)
class Host:
    """A host and the slots of it that the job uses.

    Attributes:
        name: by which the other hosts reach it.
        slots: numbers of its devices; a rank each.
    """

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: str) -> list[Host]:
    """Hosts of a file with lines "NAME slots=N", as DeepSpeed and Open MPI read it; # starts a comment.

    Raises:
        UserError: naming the first bad line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile {path}: {error}; see launch/hostfile.example") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", entry)
        if match is None:
            raise UserError(f"{path}, line {number}: {entry!r} is not of the form 'NAME slots=N' with N at least 1")
        if any(match[1] == host.name for host in hosts):
            raise UserError(f"{path}, line {number}: {match[1]} is there already; add its slots up in one line")
        hosts.append(Host(match[1], tuple(range(int(match[2])))))
    if not hosts:
        raise UserError(f"hostfile {path} names no host; see launch/hostfile.example")
    return hosts


def slurm_hosts(environ: Mapping[str, str]) -> list[Host]:
    """Hosts of the Slurm allocation that this process is in, with as many slots each as tasks were asked for.

    Raises:
        UserError: where the allocation does not say how many tasks a node has, or `scontrol` fails.
    """
    # "8(x2),4" stands for 8, 8, 4.
    tasks: list[int] = []
    for part in environ.get("SLURM_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(
                f"SLURM_TASKS_PER_NODE={environ.get('SLURM_TASKS_PER_NODE')!r} does not say how many ranks a node gets: "
                "give sbatch --nodes and --ntasks-per-node, as launch/slurm.sbatch does"
            )
        tasks += [int(match[1])] * int(match[2] or 1)
    command = ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{' '.join(command)} failed: {error}; it must be on the PATH of the batch script") from error
    return [Host(name, tuple(range(count))) for name, count in zip(names, tasks, strict=True)]


def choose(hosts: Sequence[Host], include: str, exclude: str) -> list[Host]:
    """The hosts that are left, in the order of the hostfile.

    Args:
        include: "NAME[:SLOT,...]@..." to use no others, as DeepSpeed writes it; "" for all.
        exclude: the same, to leave out.

    Raises:
        UserError: for an unknown host or slot, both at once, or where nothing is left.
    """
    if include and exclude:
        raise UserError("--include and --exclude were both given; give one")
    named = _parse_choice(include or exclude, {host.name: host for host in hosts})
    if include:
        kept = [Host(host.name, named[host.name]) for host in hosts if host.name in named]
    else:
        kept = [Host(h.name, tuple(slot for slot in h.slots if slot not in named.get(h.name, ()))) for h in hosts]
    kept = [host for host in kept if host.slots]
    if not kept:
        raise UserError(f"--exclude {exclude} leaves no slot")
    return kept


def _parse_choice(text: str, hosts: Mapping[str, Host]) -> dict[str, tuple[int, ...]]:
    named: dict[str, tuple[int, ...]] = {}
    for part in filter(None, text.split("@")):
        name, _, numbers = part.partition(":")
        if name not in hosts:
            raise UserError(f"{part!r}: the hostfile has no host {name!r}; it has {', '.join(hosts)}")
        slots = hosts[name].slots
        if numbers:
            if not re.fullmatch(r"\d+(,\d+)*", numbers):
                raise UserError(f"{part!r} is not of the form NAME[:SLOT,SLOT...]")
            slots = tuple(sorted({int(number) for number in numbers.split(",")}))
            unknown = [slot for slot in slots if slot not in hosts[name].slots]
            if unknown:
                raise UserError(f"{part!r}: {name} has no slot {unknown[0]}; it has {len(hosts[name].slots)}, from 0")
        named[name] = slots
    return named


def keep_groups_within(hosts: Sequence[Host], ep_size: int) -> list[Host]:
    """The hosts with those first that expert-parallel groups fill evenly, otherwise in their order: a group is `ep_size`
    consecutive ranks, so a host that is not filled evenly shifts all that come after it."""
    return sorted(hosts, key=lambda host: len(host.slots) % ep_size != 0)


def describe_layout(hosts: Sequence[Host], ep_size: int) -> str:
    """One line: ranks by host, and whether expert-parallel groups stay within hosts."""
    counts = [len(host.slots) for host in hosts]
    of_rank = [number for number, count in enumerate(counts) for _ in range(count)]
    starts = range(0, len(of_rank), ep_size)
    spanning = sum(len(set(of_rank[start : start + ep_size])) > 1 for start in starts)
    ranks = f"{len(of_rank)} rank(s): " + ", ".join(
        f"{count} on {h.name}" for h, count in zip(hosts, counts, strict=True)
    )
    if ep_size == 1:
        return f"{ranks}; ep_size 1: every rank holds all experts"
    groups = f"{ranks}; expert-parallel groups of {ep_size} ranks: "
    if spanning == 0:
        return f"{groups}all {len(starts)} within a host"
    within = math.gcd(ep_size, *counts)
    return f"{groups}{spanning} of {len(starts)} span hosts (ep_size {within} would keep all within)"


def write_hostfile(hosts: Sequence[Host], path: Path) -> None:
    """The hosts as launchers read them."""
    path.write_text("".join(f"{host.name} slots={len(host.slots)}\n" for host in hosts))
