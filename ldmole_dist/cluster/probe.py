"""Probe of one host, which `ldmole doctor` runs on each host: `python -m ldmole_dist.cluster.probe JSON`.

It prints one line with the facts about the host, and then answers questions from standard input, one per line.
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
MARKER = "ldmole-probe "  # prefix of the output lines, because the shell of a host may print a greeting as well


def inspect_host(
    config: str | None, folder: str, towards: str | None, interface: str | None, optimizer: str
) -> dict[str, Any]:
    """Return facts about this host: packages, code, config, free memory and disk space, GPUs, network, optimizer and limits.

    Args:
        config: configuration file of the run, or None.
        folder: output folder of the run; it need not exist yet.
        towards: name of another host of the job, or None.
        interface: network interface to use; None selects the one on the route to `towards`, or "lo" if `towards` is None.
        optimizer: `optimisation.optimizer` of the run.

    Returns:
        JSON-serializable facts by name. "memory" and "disk" are free bytes; "code" and "config" are hashes, but "config" is
        None without a config and "missing" if the file does not exist. "network_problem" is the error message if the route to
        `towards` cannot be found, otherwise "".
    """
    known = interfaces()
    network_problem = ""
    try:
        name = interface or (towards and interface_with(address_towards(towards))) or "lo"
    except OSError as error:
        name, network_problem = "", f"cannot find the route to {towards}: {error.strerror}"
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
        "network_problem": network_problem,
        "ops": how_built(optimizer),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],  # supervisors raise the soft limit to this
        "memory_lock_limited": bool(gpus) and _memory_lock_limited(),
    }


def answer(question: str) -> str:
    """Answer a question of `ldmole doctor`.

    Args:
        question: "time", "create PATH" (of an empty file), "remove PATH" or "exists PATH".

    Returns:
        For "time", the seconds since 1970; for "create" and "remove", "done"; for "exists", "yes" or "no". If the file cannot
        be accessed, the error message.
    """
    kind, _, path = question.partition(" ")
    if kind == "time":
        return repr(time.time())
    try:
        # The output folder may not exist yet; use its closest existing parent instead.
        file = _existing(Path(path)) / Path(path).name
        if kind == "create":
            file.touch()
        elif kind == "remove":
            file.unlink()
        else:
            return "yes" if file.exists() else "no"
    except OSError as error:
        return str(error)
    return "done"


def _packages() -> dict[str, str]:
    """Return the versions of Python, of this package and of its requirements (without those of extras)."""
    names = [
        re.split(r"[^\w.-]", requirement)[0]
        for requirement in importlib.metadata.requires("ldmole-dist") or []
        if "extra" not in requirement
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
    """Return the available bytes of memory, within the limit of the container if there is one (cgroup v2)."""
    available = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _memory_lock_limited() -> bool:
    """Return whether NCCL would use InfiniBand but this process may not lock the memory that InfiniBand needs."""
    devices = Path("/sys/class/infiniband")
    if not (devices.is_dir() and any(devices.iterdir())) or os.environ.get("NCCL_IB_DISABLE") == "1":
        return False
    status = Path("/proc/self/status").read_text()
    capabilities = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), 16)
    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    return not (capabilities & _CAP_IPC_LOCK) and not unlimited


def _existing(folder: Path) -> Path:
    """Return the folder, or its closest existing parent."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def main() -> None:
    """Print the facts about this host, and answer questions until standard input ends."""
    print(MARKER + json.dumps(inspect_host(**json.loads(sys.argv[1]))), flush=True)
    for line in sys.stdin:
        print(MARKER + answer(line.rstrip("\n")), flush=True)


if __name__ == "__main__":
    main()
