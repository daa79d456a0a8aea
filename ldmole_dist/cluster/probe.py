"""What one host has; `ldmole doctor` runs it on each: `python -m ldmole_dist.cluster.probe JSON`.

It prints one line, then answers questions that come line by line, until there are no more.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import ldmole_dist
from ldmole_dist.cluster.network import address_towards, interface_with, interfaces
from ldmole_dist.engine.ops import how_built

_CAP_IPC_LOCK = 1 << 14  # linux/capability.h
MARK = "ldmole-probe "  # before the line, as a host may greet with others


def look(config: str | None, folder: str, towards: str | None, interface: str | None, optimizer: str) -> dict[str, Any]:
    """All that can be found out without the other hosts.

    Args:
        config: file of the run, or None.
        folder: of its output; it need not exist yet.
        towards: another host of the job, or None.
        interface: to use, or None for the one that leads there.
        optimizer: of the run.
    """
    known = interfaces()
    problem = ""
    try:
        name = interface or (towards and interface_with(address_towards(towards))) or "lo"
    except OSError as error:
        name, problem = "", f"no way to {towards}: {error}"
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "packages": _packages(),
        "code": _hash(sorted(Path(ldmole_dist.__file__).parent.rglob("*.py"))),
        "config": None if config is None else _hash([Path(config)]) if Path(config).exists() else "missing",
        "memory": _available_memory(),
        "disk": shutil.disk_usage(_existing(Path(folder))).free,
        "gpus": gpus,
        "interface": name,
        "address": known.get(name),
        "interfaces": known,
        "network_problem": problem,
        "ops": how_built(optimizer),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],  # to which supervisors raise it
        "locked": bool(gpus) and _cannot_lock_memory(),
    }


def answer(question: str) -> str:
    """To "time", seconds since 1970; to "make PATH", "see PATH", "remove PATH" of an empty file, whether that worked."""
    kind, _, path = question.partition(" ")
    if kind == "time":
        return repr(time.time())
    try:
        if kind == "make":
            _existing(Path(path)).joinpath(Path(path).name).touch()
        elif kind == "remove":
            _existing(Path(path)).joinpath(Path(path).name).unlink()
        else:
            return "yes" if _existing(Path(path)).joinpath(Path(path).name).exists() else "no"
    except OSError as error:
        return str(error)
    return "done"


def _packages() -> dict[str, str]:
    """Versions of Python and of what this package needs."""
    names = [
        re.split(r"[^\w.-]", need)[0]
        for need in importlib.metadata.requires("ldmole-dist") or []
        if "extra" not in need
    ]
    return {"python": platform.python_version()} | {name: _version(name) for name in sorted({"ldmole-dist", *names})}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _available_memory() -> int:
    """Bytes that this host, or the container that this is, has left."""
    available = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _cannot_lock_memory() -> bool:
    """Whether InfiniBand is there and used, and this process may not lock the memory that it needs."""
    devices = Path("/sys/class/infiniband")
    if not (devices.is_dir() and any(devices.iterdir())) or os.environ.get("NCCL_IB_DISABLE") == "1":
        return False
    status = Path("/proc/self/status").read_text()
    may = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), 16) & _CAP_IPC_LOCK
    return not may and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY


def _existing(folder: Path) -> Path:
    """The folder, or the closest above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def main() -> None:
    """Speak with the doctor."""
    print(MARK + json.dumps(look(**json.loads(sys.argv[1]))), flush=True)
    for line in sys.stdin:
        print(MARK + answer(line.rstrip("\n")), flush=True)


if __name__ == "__main__":
    main()
