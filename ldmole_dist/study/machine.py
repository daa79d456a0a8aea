"""Describe the machine and the library versions, on which measurements depend."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

LIBRARIES = ("torch", "deepspeed", "transformers", "peft")


def machine() -> dict[str, str]:
    """Return a description of this machine.

    Returns:
        "device": number of GPUs and name of the first one, or "CPU".
        "processor": name of the CPU.
        "cores": number of CPU cores that this process may use.
        "memory": installed memory in GiB (written as "GB").
        "python" and the names in `LIBRARIES`: versions.
    """
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory().total / 2**30
    return {
        "device": f"{len(gpus)} x {gpus[0]}" if gpus else "CPU",
        "processor": _processor(),
        "cores": str(cores()),
        "memory": f"{memory:.0f} GB",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def setup() -> str:
    """Return the device, the clock and the torch version as one line, for the title of a benchmark's table."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, wall-clock time, torch {torch.__version__}"
    return f"CPU ({_processor()}), CPU time unless stated otherwise, torch {torch.__version__}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
