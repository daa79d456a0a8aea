"""`ldmole doctor`: looks at every host of a job before it starts; everything in red has its remedy."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ldmole_dist.cluster.checks import CHECKS, Facts
from ldmole_dist.cluster.launch import EndRequests, attempt
from ldmole_dist.cluster.remote_probe import Visit
from ldmole_dist.cluster.runners import Start
from ldmole_dist.config import Config

COLLECTIVE_SECONDS = 180.0  # without progress


def doctor(start: Start, exports: Mapping[str, str], config_path: str | None, config: Config | None) -> int:
    """Print a table of the hosts, and the remedies; if all is well, time collectives across them.

    Args:
        start: how the job is to be started.
        exports: environment variables that its ranks get.
        config_path: of the run, or None.
        config: what is in it, or None.

    Returns:
        The number of things that are wrong.
    """
    rows, problems = _look(start, exports, config_path, config)
    _print_table(["host", *CHECKS], rows)
    if not problems:
        command = [sys.executable, "-u", "-m", "ldmole_dist.cluster.collectives"]
        with EndRequests() as requests:
            verdict = attempt(start, command, exports, COLLECTIVE_SECONDS, requests)
        if verdict.stopped:
            raise KeyboardInterrupt
        failure = verdict.failure
        if failure is not None:
            remedy = "name the network between the hosts with --interface, and let them reach each other on all ports"
            problems.append(
                "\n".join([f"collectives across the hosts: {failure.who}: {failure.how}: {remedy}", *failure.lines])
            )
    for problem in problems:
        print(_red(f"wrong: {problem}"))
    print(f"doctor: {len(problems)} thing(s) to put right" if problems else "doctor: all is well", flush=True)
    return len(problems)


def _look(
    start: Start, exports: Mapping[str, str], config_path: str | None, config: Config | None
) -> tuple[list[list[str]], list[str]]:
    """The cells of each host, with a "!" before those that are wrong; and all that is wrong."""
    folder = Path("." if config is None else config.run.output_dir)
    names = [host.name for host in start.hosts]
    common = {"config": config_path, "folder": str(folder), "interface": start.interface}
    common |= {"optimizer": "adamw" if config is None else config.optimisation.optimizer}
    rows, problems = [], []
    with ExitStack() as stack:
        visits = []
        for name in names:
            towards = next((other for other in names if other != name), None)
            visits.append(stack.enter_context(Visit(start, name, exports, common | {"towards": towards})))
        for visit in visits:
            visit.wait()
        answered = [visit for visit in visits if visit.findings is not None]
        usual = _usual([visit.findings for visit in visits if visit.findings is not None])
        shared = _shared(answered, folder)
        for host, visit in zip(start.hosts, visits, strict=True):
            if visit.findings is None:
                way = (
                    "its node is up (sinfo)"
                    if start.launcher == "slurm"
                    else f"`ssh {host.name} true` works without a password"
                )
                problems.append(
                    f"{host.name}: cannot be looked at: {visit.problem}: see that {way}, or leave it out with --exclude"
                )
                rows.append([host.name, "!unreachable"])
                continue
            facts = Facts(
                found=visit.findings,
                usual=usual,
                slots=len(host.slots),
                devices=max(host.slots) + 1,
                ranks=start.size,
                hosts=len(names),
                skew=visit.clock_skew(),
                shared=shared[host.name],
            )
            row = [host.name]
            for check in CHECKS.values():
                cell, wrong = check(facts)
                row.append(f"!{cell}" if wrong else cell)
                problems += [f"{host.name}: {wrong}"] if wrong else []
            rows.append(row)
    return rows, problems


def _usual(findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What most hosts have; where two differ, the first is right."""
    usual: dict[str, Any] = {}
    for key in findings[0] if findings else ():
        values = [found[key] for found in findings]
        usual[key] = max(values, key=values.count)
    if "packages" in usual:  # package by package
        versions = [found["packages"] for found in findings]
        usual["packages"] = {
            name: max((v.get(name) for v in versions), key=[v.get(name) for v in versions].count)
            for name in versions[0]
        }
    return usual


def _shared(visits: Sequence[Visit], folder: Path) -> dict[str, str]:
    """By host, "yes" or what it said when it was to see a file that the first host has made."""
    if not visits:
        return {}
    path = folder / f".ldmole_doctor_{secrets.token_hex(4)}"
    first, *others = visits
    made = first.ask(f"make {path}")
    answers = {first.host: "yes" if made == "done" else made or "no answer"}
    answers |= {visit.host: visit.ask(f"see {path}") or "no answer" for visit in others}
    if made == "done":
        first.ask(f"remove {path}")
    return answers


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i].lstrip("!")) for row in [header, *rows] if i < len(row)) for i in range(len(header))]
    print("  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True)).rstrip())
    for row in rows:
        cells = [cell.lstrip("!").ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join(_red(c) if cell.startswith("!") else c for c, cell in zip(cells, row, strict=True)).rstrip())


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text
