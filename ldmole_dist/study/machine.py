"""What figures of a study depend on beside its settings."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

LIBRARIES = ("torch", "deepspeed", "transformers", "peft")


def machine() -> dict[str, str]:
    """The machine and the versions of what runs on it."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
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
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
