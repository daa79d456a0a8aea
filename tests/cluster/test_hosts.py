"""Hostfiles, choosing among hosts, and where expert-parallel groups come to lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldmole_dist.cluster.hosts import Host, choose, describe_layout, keep_groups_within, read_hostfile, slurm_hosts
from ldmole_dist.errors import UserError

HOSTS = [Host("a", (0, 1, 2, 3)), Host("b", (0, 1)), Host("c", (0, 1, 2, 3))]


def hosts_of(*slots: int) -> list[Host]:
    return [Host(f"host{i}", tuple(range(number))) for i, number in enumerate(slots)]


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# ours\na slots=4\n\nb   slots=2 # the small one\n")
    assert read_hostfile(str(path)) == HOSTS[:2]
    assert read_hostfile("launch/hostfile.example") == [
        Host("node-0", tuple(range(8))),
        Host("node-1", tuple(range(8))),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=4\nb\n", "line 2: 'b' is not of the form 'NAME slots=N'"),
        ("a slots=0\n", "line 1: 'a slots=0'"),
        ("a slots=four\n", "'a slots=four'"),
        ("a slots=4\na slots=2\n", "line 2: a is there already"),
        ("# nothing\n", "names no host"),
    ],
)
def test_bad_hostfile(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
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
def test_choose(include: str, exclude: str, expected: list[Host]) -> None:
    assert choose(HOSTS, include, exclude) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        ("a", "b", "both given"),
        ("d", "", "no host 'd'; it has a, b, c"),
        ("b:2", "", "b has no slot 2"),
        ("a:x", "", "not of the form"),
        ("", "a@b@c", "leaves no slot"),
    ],
)
def test_bad_choice(include: str, exclude: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose(HOSTS, include, exclude)


@pytest.mark.parametrize(
    ("slots", "ep_size", "said"),
    [
        ((2, 2), 2, "all 2 within a host"),
        ((2, 2), 4, r"1 of 1 span hosts \(ep_size 2 would keep all within\)"),
        ((3, 1), 2, r"1 of 2 span hosts \(ep_size 1 would"),
        ((2, 4, 2), 4, r"2 of 2 span hosts \(ep_size 2 would"),
        ((4, 2, 2), 4, r"1 of 2 span hosts"),
        ((8, 8), 1, "every rank holds all experts"),
    ],
)
def test_layout(slots: tuple[int, ...], ep_size: int, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(describe_layout(hosts_of(*slots), ep_size))


def test_hosts_that_groups_fill_evenly_come_first() -> None:
    assert [len(host.slots) for host in keep_groups_within(hosts_of(2, 4, 2, 8), 4)] == [4, 8, 2, 2]
    assert keep_groups_within(hosts_of(2, 4, 2), 2) == hosts_of(2, 4, 2)


def test_slurm_needs_to_say_how_many_tasks() -> None:
    with pytest.raises(UserError, match="--ntasks-per-node"):
        slurm_hosts({"SLURM_JOB_NODELIST": "a"})


def test_slurm_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames a[1-3]" ] && printf "a1\\na2\\na3\\n"\n')
    scontrol.chmod(0o755)
    environ = {"SLURM_JOB_NODELIST": "a[1-3]", "SLURM_TASKS_PER_NODE": "8(x2),4"}
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [(host.name, len(host.slots)) for host in slurm_hosts(environ)] == [("a1", 8), ("a2", 8), ("a3", 4)]
    with pytest.raises(UserError, match="scontrol show hostnames b failed"):
        slurm_hosts(environ | {"SLURM_JOB_NODELIST": "b"})
