"""Hostfiles, Slurm allocations, selection of hosts, and placement of expert-parallel groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldmole_dist.cluster.hosts import Host, describe_layout, order_for_groups, read_hostfile, select_hosts, slurm_hosts
from ldmole_dist.errors import UserError

HOSTS = [Host("a", (0, 1, 2, 3)), Host("b", (0, 1)), Host("c", (0, 1, 2, 3))]


def hosts_of(*slots: int) -> list[Host]:
    return [Host(f"host{i}", tuple(range(number))) for i, number in enumerate(slots)]


def test_hostfile_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# our hosts\na slots=4\n\nb   slots=2 # small\n")
    assert read_hostfile(str(path)) == HOSTS[:2]
    assert read_hostfile("launch/hostfile.example") == [
        Host("node-0", tuple(range(8))),
        Host("node-1", tuple(range(8))),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=4\nb\n", "line 2: 'b' does not have the form 'NAME slots=N'"),
        ("a slots=0\n", "line 1: 'a slots=0'"),
        ("a slots=four\n", "'a slots=four'"),
        ("a slots=4\na slots=2\n", "line 2: host a is already listed"),
        ("# nothing\n", "lists no host"),
    ],
)
def test_invalid_hostfile_raises(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(str(path))
    with pytest.raises(UserError, match="launch/hostfile.example"):
        read_hostfile(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("", "", HOSTS),
        ("c@a", "", [HOSTS[0], HOSTS[2]]),
        ("a:1,3@b", "", [Host("a", (1, 3)), HOSTS[1]]),
        ("", "b", [HOSTS[0], HOSTS[2]]),
        ("", "a:0@b:1", [Host("a", (1, 2, 3)), Host("b", (0,)), HOSTS[2]]),
        ("", "b:0,1@c", [HOSTS[0]]),
    ],
)
def test_select_hosts_includes_and_excludes(include: str, exclude: str, expected: list[Host]) -> None:
    assert select_hosts(HOSTS, include, exclude) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("a", "b", "both set"),
        ("d", "", "--include d: there is no host 'd'; choose from a, b, c"),
        ("b:2", "", "b has no slot 2"),
        ("a:x", "", "does not have the form"),
        ("", "a@b@c", "leaves no slot"),
    ],
)
def test_invalid_selection_raises(include: str, exclude: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_hosts(HOSTS, include, exclude)


@pytest.mark.parametrize(
    ("slots", "ep_size", "expected"),
    [
        ((2, 2), 2, "all 2 within a host"),
        ((2, 2), 4, "1 of 1 span hosts (with ep_size=2 none would)"),
        ((3, 1), 2, "1 of 2 span hosts (with ep_size=1 none"),
        ((2, 4, 2), 4, "2 of 2 span hosts (with ep_size=2 none"),
        ((4, 2, 2), 4, "1 of 2 span hosts"),
        ((8, 8), 1, "each rank holds all experts"),
    ],
)
def test_layout_counts_the_groups_that_span_hosts(slots: tuple[int, ...], ep_size: int, expected: str) -> None:
    assert expected in describe_layout(hosts_of(*slots), ep_size)


def test_hosts_with_a_multiple_of_ep_size_slots_come_first() -> None:
    assert [len(host.slots) for host in order_for_groups(hosts_of(2, 4, 2, 8), 4)] == [4, 8, 2, 2]
    assert order_for_groups(hosts_of(2, 4, 2), 2) == hosts_of(2, 4, 2)


def test_slurm_allocation_without_tasks_per_node_raises() -> None:
    with pytest.raises(UserError, match="--ntasks-per-node"):
        slurm_hosts({"SLURM_JOB_NODELIST": "a"})


def test_slurm_allocation_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames a[1-3]" ] && printf "a1\\na2\\na3\\n"\n')
    scontrol.chmod(0o755)
    environ = {"SLURM_JOB_NODELIST": "a[1-3]", "SLURM_TASKS_PER_NODE": "8(x2),4"}
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [(host.name, len(host.slots)) for host in slurm_hosts(environ)] == [("a1", 8), ("a2", 8), ("a3", 4)]
    with pytest.raises(UserError, match="scontrol show hostnames b failed"):
        slurm_hosts(environ | {"SLURM_JOB_NODELIST": "b"})
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST is not set"):
        slurm_hosts({"SLURM_TASKS_PER_NODE": "8"})
    with pytest.raises(UserError, match=r"is for 2 nodes, but SLURM_JOB_NODELIST=a\[1-3\] names 3"):
        slurm_hosts(environ | {"SLURM_TASKS_PER_NODE": "8(x2)"})
