"""Tests of the scaling study's folder: no measured row is lost, and rows that are not comparable are refused."""

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldmole_dist.errors import EXIT_EXPLAINED, UserError
from ldmole_dist.selftest.local_ranks import RankFailed
from ldmole_dist.study.bench import latency as bench_latency
from ldmole_dist.study.bench.latency import PARTS, Latency, Settings
from ldmole_dist.study.scaling import command, measure
from ldmole_dist.study.scaling.cells import Cell
from ldmole_dist.study.scaling.code import MEASURED_BY, PACKAGE, code, imported
from ldmole_dist.study.scaling.measure import Measured
from ldmole_dist.study.scaling.store import COLUMNS, Store, done, failed
from tests.study.scaling_rows import GRID, MACHINE, TINY, measured


def test_interrupted_study_runs_only_the_missing_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, ran = GRID.cells()[:6], []

    def interrupted(cell: Cell, *args: Any, **kwargs: Any) -> Measured:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(cell)
        return measured(0.1 + len(ran))

    monkeypatch.setattr(measure, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command._measure_missing(Store(tmp_path, MACHINE), cells, steps=1, timeout=1)
    assert [row.cell for row in Store(tmp_path, MACHINE).rows()] == ran == cells[:3]

    def rest(cell: Cell, *args: Any, **kwargs: Any) -> Measured:
        ran.append(cell)
        return measured(1.5)

    monkeypatch.setattr(measure, "measure", rest)
    command._measure_missing(Store(tmp_path, MACHINE), cells, steps=1, timeout=1)
    assert ran == cells
    rows = Store(tmp_path, MACHINE).rows()
    assert [row.cell for row in rows] == cells
    assert [row.measured.seconds for row in rows if row.measured] == [1.1, 2.1, 3.1, 1.5, 1.5, 1.5]


def test_rows_round_trip_and_an_incomplete_row_is_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    rows = [
        done(TINY, measured(0.25, wire={"rows": 3.5})),
        failed(replace(TINY, layers=2), RankFailed('x\n\nError: "a, b"\n')),
    ]
    for row in rows:
        store.add(row)
    store.add(done(replace(TINY, layers=3), measured(1.0)))
    store.table.write_text(store.table.read_text()[:-10])  # killed while it was written
    assert Store(tmp_path, None).rows() == rows
    assert Store(tmp_path, MACHINE).rows() == rows
    assert rows[1].status == 'Error: "a, b"'
    assert failed(TINY, OSError(12, "Cannot allocate memory")).status == "OSError: [Errno 12] Cannot allocate memory"
    for cut in (5, 0):  # killed while the header was written
        store.table.write_text(store.table.read_text()[:cut])
        assert Store(tmp_path, None).rows() == Store(tmp_path, MACHINE).rows() == []
        assert store.table.read_text() == ",".join(COLUMNS) + "\n"


def test_full_disk_is_reported_and_loses_no_row(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    store.add(done(TINY, measured(0.25)))
    whole, limits = store.table.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))  # like a full disk, takes a part of the row
    try:
        with pytest.raises(
            UserError,
            match=r"cannot write .*cells\.csv: File too large\. Existing content is unchanged; .* the same command",
        ):
            store.add(done(replace(TINY, layers=2), measured(0.5)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.table.read_text() == whole
    again = Store(tmp_path, MACHINE)
    again.add(done(replace(TINY, layers=3), measured(0.5)))
    assert [row.cell.layers for row in again.rows()] == [1, 3]
    store.latency.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*latency\.json: Is a directory"):
        store.add_latencies("why")
    assert store.latencies() is None


def test_latency_that_fails_is_recorded_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[Exception] = [RankFailed("measure_shape failed on rank 0:\nTraceback\nOutOfMemoryError: tried <all>")]
    found = [Latency("small", "generation", 1, 10.0, dict.fromkeys(PARTS, 1.0), "float32")]
    runs = []

    def bench(settings: Settings) -> list[Latency]:
        runs.append(settings)
        if raised:
            raise raised.pop()
        return found

    monkeypatch.setattr(bench_latency, "bench_latency", bench)
    store = Store(tmp_path, MACHINE)
    store.add(done(TINY, measured(1.0)))
    command._measure_latency(store, is_full=False)
    assert "OutOfMemoryError" in capsys.readouterr().err
    assert Store(tmp_path, None).latencies() == "OutOfMemoryError: tried <all>"
    raised.append(ValueError("odd"))
    command._measure_latency(Store(tmp_path, MACHINE), is_full=False)
    assert Store(tmp_path, None).latencies() == "ValueError: odd"
    for _ in range(2):
        command._measure_latency(Store(tmp_path, MACHINE), is_full=False)
        assert Store(tmp_path, None).latencies() == found and len(runs) == 3


def test_failed_cell_is_recorded_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = GRID.cells()[:4]

    def sometimes(cell: Cell, *args: Any, **kwargs: Any) -> Measured:
        if cell == cells[1]:
            raise RankFailed("run_cell failed on rank 1:\nTraceback\nOutOfMemoryError: tried to allocate")
        if cell == cells[2]:
            raise OSError(12, "Cannot allocate memory")
        return measured(1.0)

    monkeypatch.setattr(measure, "measure", sometimes)
    store = Store(tmp_path, MACHINE)
    command._measure_missing(store, cells, steps=1, timeout=1)
    statuses = ["ok", "OutOfMemoryError: tried to allocate", "OSError: [Errno 12] Cannot allocate memory", "ok"]
    assert [row.status for row in store.rows()] == statuses
    assert "OutOfMemoryError" in capsys.readouterr().err
    monkeypatch.setattr(measure, "measure", None)  # nothing is left to run; a failed cell is not run again
    command._measure_missing(store, cells, steps=1, timeout=1)


def test_cell_that_times_out_is_recorded_as_failed(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    command._measure_missing(store, [TINY], steps=1, timeout=0.5)
    (row,) = store.rows()
    assert row.measured is None and "did not return within" in row.status


def test_folder_of_another_machine_or_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, MACHINE).add(done(TINY, measured(1.0)))
    with pytest.raises(UserError, match=r"other settings \(torch 1, now 2\); choose another --output"):
        Store(tmp_path, MACHINE | {"torch": "2"})
    assert len(Store(tmp_path, None).rows()) == 1  # to write its page on another machine
    with pytest.raises(UserError, match=r"other settings \(timed_steps 7, now 5\)"):
        Store(tmp_path, MACHINE | {"timed_steps": "5"})
    table = tmp_path / "cells.csv"
    table.write_text(table.read_text().replace("dispatch", "transport", 1))
    with pytest.raises(UserError, match=r"cells\.csv does not .* \(different: dispatch, transport\); choose another --output"):
        Store(tmp_path, MACHINE)
    (tmp_path / "machine.json").write_text("{")
    with pytest.raises(UserError, match=r"machine\.json is damaged"):
        Store(tmp_path, None)


def test_number_of_steps_is_recorded_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(measure, "measure", lambda cell, *steps: ran.append(steps) or measured(1.0))
    monkeypatch.setattr(command, "_measure_latency", lambda *_: None)
    monkeypatch.setattr("ldmole_dist.study.scaling.page.write_page", lambda store: "no model")
    from ldmole_dist.cli import main

    study = ["scaling", "--output", str(tmp_path), "--ranks", "1", "--layers", "1", "--timeout", "9"]
    assert main([*study, "--steps", "3"]) == 0 and set(ran) == {(3, measure.WARMUP, 9.0)}
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["timed_steps"] == "3" and machine["warmup_steps"] == str(measure.WARMUP)
    assert main([*study, "--steps", "4"]) == EXIT_EXPLAINED


def test_code_hash_covers_exactly_what_a_cell_imports(tmp_path: Path) -> None:
    ours = {str(path.relative_to(PACKAGE)) for path in imported(PACKAGE, MEASURED_BY)}
    assert ours >= {"method/layer.py", "parallel/dispatch.py", "engine/build.py", "study/scaling/cells.py"}
    assert ours >= {"study/bench/latency.py", "study/timing.py", "selftest/local_ranks.py", "__init__.py"}
    others = ("cli.py", "cluster/", "monitor/", "checkpoint/", "report/", "planner/", "study/scaling/page.py")
    assert not [name for name in ours if name.startswith(others)]

    package, configs = tmp_path / "package", tmp_path / "configs"
    sources = {
        "measure.py": "import os\nfrom package.room import helper\n\n\ndef f():\n    import package.lazy as lazy\n",
        "room/__init__.py": "",
        "room/helper.py": "from package.deep import value\nfrom package.measure import f\n",
        "room/other.py": "",
        "deep.py": "value = 1\n",
        "lazy.py": "",
        "cli.py": "from package.measure import f\n",
    }
    for name, text in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    configs.mkdir()
    (configs / "zero2.json").write_text("{}")

    def hashed() -> str:
        return code(package, (package / "measure.py",), configs)

    before, matters = hashed(), set()
    for path in [*package.rglob("*.py"), configs / "zero2.json"]:
        text = path.read_text()
        path.write_text(text + " \n")
        if hashed() != before:
            matters.add(path.name)
        path.write_text(text)
        assert hashed() == before
    assert matters == {"measure.py", "__init__.py", "helper.py", "deep.py", "lazy.py", "zero2.json"}


def test_unusable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file.*choose a folder that you can write"):
        Store(tmp_path / "file", MACHINE)
    store = Store(tmp_path / "study", MACHINE)
    store.table.write_text(store.table.read_text() + "2,what\n")
    with pytest.raises(UserError, match=r"cells.csv, line 2 cannot be read .*; delete that line"):
        store.rows()
