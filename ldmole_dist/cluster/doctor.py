"""`ldmole doctor`: check every host of a job before the start, and print each problem with its remedy."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ldmole_dist.cluster.checks import CHECKS, HostFacts
from ldmole_dist.cluster.launch import run_attempt
from ldmole_dist.cluster.remote_probe import RemoteProbe
from ldmole_dist.cluster.runners import LaunchSpec
from ldmole_dist.cluster.stop_requests import StopSignals
from ldmole_dist.config import Config

COLLECTIVES_STALL_SECONDS = 180.0
_PROBLEM = "!"  # prefix of a table cell that has a problem


def doctor(spec: LaunchSpec, exports: Mapping[str, str], config_path: str | None, config: Config | None) -> int:
    """Check the hosts, and print a table and the problems found; if there are no problems, time collectives on all ranks.

    Args:
        spec: launcher and hosts of the job.
        exports: environment variables for the ranks.
        config_path: configuration file of the run, or None.
        config: configuration of the run (that file with overrides), or None.

    Returns:
        The number of problems.

    Raises:
        KeyboardInterrupt: if a stop is requested while the collectives run.
        UserError: if the collectives cannot be started (see `run_attempt`).
    """
    rows, problems = _check_hosts(spec, exports, config_path, config)
    _print_table(["host", *CHECKS], rows)
    if not problems:
        problems = _check_collectives(spec, exports)
    for problem in problems:
        print(_red(f"problem: {problem}"))
    print(f"doctor: {len(problems)} problem(s) found" if problems else "doctor: no problems found", flush=True)
    return len(problems)


def _check_hosts(
    spec: LaunchSpec, exports: Mapping[str, str], config_path: str | None, config: Config | None
) -> tuple[list[list[str]], list[str]]:
    """Return the table rows and the problems of all hosts."""
    output_dir = Path("." if config is None else config.run.output_dir)
    names = [host.name for host in spec.hosts]
    common = {"config": config_path, "folder": str(output_dir), "interface": spec.interface}
    common |= {"optimizer": "adamw" if config is None else config.optimisation.optimizer}
    rows, problems = [], []
    with ExitStack() as stack:
        probes = []
        for name in names:  # start all probes before waiting for any, so that they run in parallel
            towards = next((other for other in names if other != name), None)
            probes.append(stack.enter_context(RemoteProbe(spec, name, exports, common | {"towards": towards})))
        for probe in probes:
            probe.wait()
        reachable = [probe for probe in probes if probe.findings is not None]
        majority = _majority([probe.findings for probe in probes if probe.findings is not None])
        output_shared = _check_output_shared(reachable, output_dir)
        for host, probe in zip(spec.hosts, probes, strict=True):
            if probe.findings is None:
                rows.append([host.name, f"{_PROBLEM}not checked"])
                problems.append(f"{host.name}: {_not_checked(spec, host.name, probe.error)}")
                continue
            facts = HostFacts(
                found=probe.findings,
                majority=majority,
                slots=len(host.slots),
                devices=max(host.slots) + 1,
                ranks=spec.world_size,
                hosts=len(names),
                clock_skew=probe.clock_skew(),
                output_shared=output_shared[host.name],
            )
            row = [host.name]
            for check in CHECKS.values():
                cell, problem = check(facts)
                row.append(f"{_PROBLEM}{cell}" if problem else cell)
                problems += [f"{host.name}: {problem}"] if problem else []
            rows.append(row)
    return rows, problems


def _not_checked(spec: LaunchSpec, host: str, error: str) -> str:
    if spec.launcher == "local":
        return f"cannot be checked: {error}: verify the installation (ldmole selftest)"
    remedy = "check that the node is up (sinfo)"
    if spec.launcher != "slurm":
        command = " ".join(filter(None, ["ssh", spec.ssh_args, host, "true"]))
        remedy = f"make sure that `{command}` works without a password"
    remedy += " and that the repository and its .venv have the same paths there"
    return f"cannot be checked: {error}: {remedy}, or leave the host out with --exclude {host}"


def _check_collectives(spec: LaunchSpec, exports: Mapping[str, str]) -> list[str]:
    """Time collectives with one process per rank, started like the job, and return the problems."""
    command = [sys.executable, "-u", "-m", "ldmole_dist.cluster.collectives"]
    with StopSignals() as signals:
        result = run_attempt(spec, command, exports, COLLECTIVES_STALL_SECONDS, signals)
    if result.stop_requested:
        raise KeyboardInterrupt
    if result.failure is None:
        return []
    remedy = "correct the error that the output shows"
    if len(spec.hosts) > 1:
        remedy += ", or set --interface to the network between the hosts and open all ports between them"
    problem = f"collectives on all ranks: {result.failure.source} {result.failure.description}: {remedy}"
    return ["\n".join([problem, *result.failure.last_lines])]


def _majority(findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the most frequent value of each key, and for "packages" of each package; on a tie, the value found first."""
    majority: dict[str, Any] = {}
    for key in findings[0] if findings else ():
        values = [found[key] for found in findings]
        majority[key] = max(values, key=values.count)
    if "packages" in majority:
        packages = [found["packages"] for found in findings]
        versions = {name: [by_name.get(name) for by_name in packages] for name in packages[0]}
        majority["packages"] = {name: max(values, key=values.count) for name, values in versions.items()}
    return majority


def _check_output_shared(probes: Sequence[RemoteProbe], output_dir: Path) -> dict[str, str]:
    """Check whether the hosts share the output folder: the first host creates a file in it, and the others look for the file.

    Args:
        probes: probes of the hosts that answered.
        output_dir: output folder of the run.

    Returns:
        By host, "yes", "no", "not checked" or an error message (see `HostFacts.output_shared`).
    """
    if not probes:
        return {}
    path = output_dir / f".ldmole_doctor_{secrets.token_hex(4)}"
    first, *others = probes
    created = first.ask(f"create {path}")
    if created != "done":
        return {probe.host: "not checked" for probe in others} | {first.host: created or "not checked"}
    answers = {probe.host: probe.ask(f"exists {path}") or "not checked" for probe in others}
    first.ask(f"remove {path}")
    return answers | {first.host: "yes"}


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with problems in red on a terminal. A row may have fewer cells than the header."""
    columns = range(len(header))
    widths = [max(len(row[i].removeprefix(_PROBLEM)) for row in [header, *rows] if i < len(row)) for i in columns]
    print("  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True)).rstrip())
    for row in rows:
        cells = []
        for cell, width in zip(row, widths, strict=False):
            text = cell.removeprefix(_PROBLEM).ljust(width)
            cells.append(_red(text) if cell.startswith(_PROBLEM) else text)
        print("  ".join(cells).rstrip())


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text
