"""`mpirun ... ldmole launch CONFIG`: mpirun starts the ranks, and mpi4py is used for their rendezvous."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.two_hosts import processes_of
from tests.small_run import make_config, make_folder

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


def mpirun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    mpi = [
        str(Path(sys.executable).parent / "mpirun"),
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
        "-n",
        "2",
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*mpi, sys.executable, *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """Wait for a process, and return its output."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def test_training_completes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    config = make_config(tmp_path, optimisation={"max_steps": 2})
    process = mpirun(tmp_path, "-m", "ldmole_dist.cli", "launch", str(config))
    output = finish(process, 400)
    assert process.returncode == 0 and "starting all ranks: 0, 1 on" in output, output
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists() and not processes_of(tmp_path)


def test_training_without_supervisors_completes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    config = make_config(tmp_path, optimisation={"max_steps": 2})
    process = mpirun(tmp_path, str(Path(__file__).parents[2] / "launch" / "train.py"), str(config))
    output = finish(process, 400)
    assert process.returncode == 0 and "2 rank(s) on" in output, output
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("event", ["killed", "signalled"])
def test_killed_rank_or_signal_ends_all_ranks(tmp_path: Path, event: str) -> None:
    make_folder(tmp_path)
    config = make_config(tmp_path, optimisation={"max_steps": 5000})
    process = mpirun(tmp_path, "-m", "ldmole_dist.cli", "launch", str(config))
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, finish(process, 10)
        time.sleep(0.1)
    ranks = [p for p in processes_of(tmp_path) if "train" in p.cmdline() and "--coordinator" not in p.cmdline()]
    assert len(ranks) == 2
    if event == "killed":
        next(p for p in ranks if p.environ()["RANK"] == "1").kill()
    else:
        # To a supervisor, as a scheduler may send it. On a signal to itself, mpirun kills its processes after about a second,
        # which may be too short for a save.
        next(p for p in ranks if p.environ()["RANK"] == "1").parent().send_signal(signal.SIGTERM)
    output = finish(process, 30)
    assert process.returncode != 0 and not processes_of(tmp_path), output
    if event == "killed":
        assert "first failure: rank 1 on" in output and "killed by signal 9" in output, output
    else:
        assert list((tmp_path / "run" / "checkpoints").glob("step_*")), output
