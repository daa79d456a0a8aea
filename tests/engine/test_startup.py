"""Joining a process group, with and without a launcher, and errors that reach all ranks."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch.distributed as dist

from ldmole_dist.distributed import raise_on_all_ranks
from ldmole_dist.engine import startup
from ldmole_dist.engine.startup import start
from ldmole_dist.errors import PeerError, UserError
from ldmole_dist.selftest.local_ranks import LocalRanks, RankFailed


def fail_on(failing: list[int]) -> tuple[str, str]:
    """Return (error class, message) that `raise_on_all_ranks` raises on this rank, and check that the group still works."""
    rank = dist.get_rank()
    outcome = ("none", "")
    try:
        with raise_on_all_ranks("reading the data"):
            if rank in failing:
                raise UserError(f"rank {rank} has no file")
    except (UserError, PeerError) as error:
        outcome = type(error).__name__, str(error)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rank)
    assert gathered == list(range(dist.get_world_size()))
    return outcome


@pytest.mark.parametrize("failing", [[0], [1]])
def test_an_error_of_one_rank_reaches_all(ranks2: LocalRanks, failing: list[int]) -> None:
    outcomes = ranks2.run(fail_on, failing)
    (first,) = failing
    assert outcomes[first] == ("UserError", f"rank {first} has no file")
    message = f"rank {first} failed while reading the data: UserError: rank {first} has no file"
    assert outcomes[1 - first] == ("PeerError", message)


def test_lowest_failing_rank_is_named(ranks2: LocalRanks) -> None:
    outcomes = ranks2.run(fail_on, [0, 1])
    assert outcomes[0] == ("UserError", "rank 0 has no file")
    assert outcomes[1][0] == "PeerError" and "rank 0 failed" in outcomes[1][1]


def test_without_failure_all_ranks_continue(ranks2: LocalRanks) -> None:
    assert ranks2.run(fail_on, []) == [("none", "")] * 2


def rank_and_world_size() -> tuple[int, int, bool]:
    process = start()
    return process.rank, process.world_size, process.is_main


def test_start_returns_rank_and_world_size(ranks2: LocalRanks) -> None:
    assert ranks2.run(rank_and_world_size) == [(0, 2, True), (1, 2, False)]


def test_single_process_raises_the_original_error() -> None:
    with pytest.raises(UserError, match="no file"), raise_on_all_ranks("reading the data"):
        raise UserError("no file")


def test_start_without_launcher_has_world_size_one() -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    code = "from ldmole_dist.engine.startup import start; p = start(); print('alone', p.rank, p.world_size, p.is_main)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert "alone 0 1 True" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("variable", "devices", "device"), [("LOCAL_RANK", 1, 0), ("OMPI_COMM_WORLD_LOCAL_RANK", 4, 3)]
)
def test_each_rank_has_the_device_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, variable: str, devices: int, device: int
) -> None:
    """Slurm can show each rank one device only, and mpirun does not set LOCAL_RANK. The accelerator is a stub."""
    calls: list[str] = []
    accelerator = SimpleNamespace(
        device_name=lambda number=None: "cuda" if number is None else f"cuda:{number}",
        device_count=lambda: devices,
        set_device=lambda number: calls.append(f"device {number}"),
        communication_backend_name=lambda: "nccl",
    )
    for name, value in (("RANK", "3"), (variable, "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(startup, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)

    def init_distributed(**settings: Any) -> None:
        calls.append(f"{variable} {os.environ[variable]}")  # DeepSpeed reads the device index from it
        monkeypatch.setenv("LOCAL_RANK", "3")  # as DeepSpeed does inside mpirun

    monkeypatch.setattr(deepspeed, "init_distributed", init_distributed)
    process = start()
    assert calls == [f"device {device}", f"{variable} {device}"]
    assert os.environ["LOCAL_RANK"] == os.environ[variable] == str(device)  # DeepSpeed's engine compares them
    assert (process.rank, process.world_size, str(process.device)) == (3, 4, f"cuda:{device}")


def fail_in_one(failing: int) -> int:
    if dist.get_rank() == failing:
        raise UserError("intended failure")
    return dist.get_rank()


@pytest.mark.full
def test_local_ranks_report_a_failure_and_stay_usable() -> None:
    with LocalRanks(2, timeout=100) as ranks:
        with pytest.raises(RankFailed, match="fail_in_one failed on rank 1(.|\n)*UserError: intended failure"):
            ranks.run(fail_in_one, 1)
        assert ranks.run(fail_in_one, 7) == [0, 1]
