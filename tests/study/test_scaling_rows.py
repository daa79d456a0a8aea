"""Tests of the scaling study's folder: no measured row is lost, and rows that are not comparable are refused."""

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldmole_dist.errors import EXIT_EXPLAINED, UserError
from ldmole_dist.selftest.local_ranks import RankFailed
from ldmole_dist.study.scaling import measure
from ldmole_dist.study.scaling.cells import Cell
from ldmole_dist.study.scaling.command import measure_missing
from ldmole_dist.study.scaling.measure import Measured
from ldmole_dist.study.scaling.rows import Row, code, reason
from tests.study.scaling_rows import GRID, MACHINE, TINY, measured, study


def test_interrupted_study_runs_only_the_missing_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, ran = GRID.cells()[:6], []

    def interrupted(cell: Cell, *args: Any, **kwargs: Any) -> Measured:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(cell)
        return measured(0.1 + len(ran))

    monkeypatch.setattr(measure, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_missing(study(tmp_path, MACHINE), cells, steps=1, timeout=1)
    assert [row.cell for row in study(tmp_path, MACHINE).rows()] == ran == cells[:3]

    def rest(cell: Cell, *args: Any, **kwargs: Any) -> Measured:
        ran.append(cell)
        return measured(1.5)

    monkeypatch.setattr(measure, "measure", rest)
    measure_missing(study(tmp_path, MACHINE), cells, steps=1, timeout=1)
    assert ran == cells
    rows = study(tmp_path, MACHINE).rows()
    assert [row.cell for row in rows] == cells
    assert [row.measured.seconds for row in rows if row.measured] == [1.1, 2.1, 3.1, 1.5, 1.5, 1.5]


def test_rows_round_trip_and_an_incomplete_row_is_dropped(tmp_path: Path) -> None:
    store = study(tmp_path, MACHINE)
    rows = [Row(TINY, measured(0.25, steps=[0.5, 0.125])), Row(replace(TINY, layers=2), error='Error: "a, b"')]
    for row in [*rows, Row(replace(TINY, layers=3), measured(1.0))]:
        store.add(row)
    store.table.write_text(store.table.read_text()[:-10])  # killed while it was written
    assert study(tmp_path).rows() == study(tmp_path, MACHINE).rows() == rows


def test_reason_is_the_last_line_of_the_error() -> None:
    assert reason(RankFailed('x\n\nError: "a, b"\n')) == 'Error: "a, b"'
    assert reason(OSError(12, "Cannot allocate memory")) == "OSError: [Errno 12] Cannot allocate memory"


def test_full_disk_is_reported_and_loses_no_row(tmp_path: Path) -> None:
    store = study(tmp_path, MACHINE)
    store.add(Row(TINY, measured(0.25)))
    whole, limits = store.table.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))  # like a full disk, takes a part of the row
    try:
        with pytest.raises(
            UserError,
            match=r"cannot write .*cells\.jsonl: File too large\. Existing content is unchanged; .* the same command",
        ):
            store.add(Row(replace(TINY, layers=2), measured(0.5)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.table.read_text() == whole
    again = study(tmp_path, MACHINE)
    again.add(Row(replace(TINY, layers=3), measured(0.5)))
    assert [row.cell.layers for row in again.rows()] == [1, 3]


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
    store = study(tmp_path, MACHINE)
    measure_missing(store, cells, steps=1, timeout=1)
    errors = [None, "OutOfMemoryError: tried to allocate", "OSError: [Errno 12] Cannot allocate memory", None]
    assert [row.error for row in store.rows()] == errors
    assert "OutOfMemoryError" in capsys.readouterr().err
    monkeypatch.setattr(measure, "measure", None)  # nothing is left to run; a failed cell is not run again
    measure_missing(store, cells, steps=1, timeout=1)


def test_cell_that_times_out_is_recorded_as_failed(tmp_path: Path) -> None:
    store = study(tmp_path, MACHINE)
    measure_missing(store, [TINY], steps=1, timeout=0.5)
    (row,) = store.rows()
    assert row.measured is None and row.error is not None and "did not return within" in row.error


def test_folder_of_another_machine_or_version_is_refused(tmp_path: Path) -> None:
    study(tmp_path, MACHINE).add(Row(TINY, measured(1.0)))
    with pytest.raises(UserError, match=r"other conditions \(torch 1, now 2\); choose another --output"):
        study(tmp_path, MACHINE | {"torch": "2"})
    assert len(study(tmp_path).rows()) == 1  # to write its page on another machine
    with pytest.raises(UserError, match=r"other conditions \(timed_steps 7, now 5\)"):
        study(tmp_path, MACHINE | {"timed_steps": "5"})
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(UserError, match=r"about\.json is damaged"):
        study(tmp_path)


def test_number_of_steps_is_recorded_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(measure, "measure", lambda cell, *steps: ran.append(steps) or measured(1.0))
    monkeypatch.setattr("ldmole_dist.study.scaling.page.write_page", lambda study: None)
    from ldmole_dist.cli import main

    arguments = ["scaling", "--output", str(tmp_path), "--ranks", "1", "--layers", "1", "--timeout", "9"]
    assert main([*arguments, "--steps", "3"]) == 0 and set(ran) == {(3, measure.WARMUP, 9.0)}
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["timed_steps"] == "3" and about["warmup_steps"] == str(measure.WARMUP)
    assert main([*arguments, "--steps", "4"]) == EXIT_EXPLAINED


def test_code_hash_covers_every_module_and_config(tmp_path: Path) -> None:
    package, configs = tmp_path / "package", tmp_path / "configs"
    paths = [package / "measure.py", package / "room" / "helper.py", configs / "zero2.json"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    before = code(package, configs)
    for path in paths:
        path.write_text("2")
        assert code(package, configs) != before
        path.write_text("1")
    (package / "notes.txt").write_text("")
    assert code(package, configs) == before and len(code()) == 12


def test_unusable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file.*choose a folder that you can write"):
        study(tmp_path / "file", MACHINE)
    store = study(tmp_path / "study", MACHINE)
    for line in (
        "2,what\n",
        '{"cell": {"transport": 1}, "measured": null, "error": null}\n',
        '{"cell": null}\n',
        "[]\n",
    ):
        store.table.write_text(line)
        with pytest.raises(UserError, match=r"cells.jsonl, line 1 cannot be read .*; delete that line"):
            store.rows()
