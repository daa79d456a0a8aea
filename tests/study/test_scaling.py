"""The scaling study: what it runs, that it loses nothing, that its model is honest, that its page says what rows say."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PREEMPTED, UserError
from ldmole_dist.ranks import LocalRanks, RankFailed
from ldmole_dist.study import bench_latency, html
from ldmole_dist.study.bench_latency import PARTS, Latency, Settings
from ldmole_dist.study.scaling import command, figures, grids, measure, results, sections
from ldmole_dist.study.scaling.active import ActiveExperts, fit_active
from ldmole_dist.study.scaling.cells import Cell
from ldmole_dist.study.scaling.code import MEASURED_BY, PACKAGE, code, imported
from ldmole_dist.study.scaling.fit import Model, Sample, errors, fit, held_out
from ldmole_dist.study.scaling.measure import Measured, run_cell, summary
from ldmole_dist.study.scaling.page import write_page
from ldmole_dist.study.scaling.prediction import SEEN, Prediction, predict, rate
from ldmole_dist.study.scaling.series import Point, along, base_of, replicated, spread, strong, weak
from ldmole_dist.study.scaling.sheet import Page
from ldmole_dist.study.scaling.store import COLUMNS, Row, Store, done, failed
from ldmole_dist.study.scaling.study import Study, placements, speedup, throughput
from ldmole_dist.study.scaling.terms import UNITS, terms

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_name("recorded_study")  # launch/scaling_study.py --output tests/study/recorded_study
TINY = Cell(ranks=1, ep_size=1, hidden=64, layers=1, experts=4, lora_rank=2, micro_batch=1, seq=16)
MACHINE = {
    "device": "CPU",
    "processor": "any",
    "cores": "2",
    "torch": "1",
    "code": "abc",
    "warmup_steps": "4",
    "timed_steps": "7",
}
GRID = grids.quick("fp32")


def measured(seconds: float, **other: Any) -> Measured:
    values: dict[str, Any] = dict(
        seconds=seconds,
        steps=[seconds],
        cpu_seconds=seconds,
        cores_elsewhere=0.0,
        peak_bytes=1,
        experts_per_token=3.0,
        wire={"rows": 5.0},
        wire_bytes=20.0,
        tokens_per_second=1 / seconds,
    )
    return Measured(**values | other)


# What it runs


def test_a_cell_is_trained_and_measured(ranks2: LocalRanks) -> None:
    cell = replace(TINY, ranks=2, ep_size=2, accumulation=2, dispatch="gather")
    result = summary(cell, ranks2.run(run_cell, cell, 3, 1))
    assert len(result.steps) == 3 and min(result.steps) <= result.seconds <= max(result.steps)
    assert result.tokens_per_second == pytest.approx(2 * 2 * 16 / result.seconds)
    assert 1 <= result.experts_per_token <= 4 and result.peak_bytes > 0 and result.cpu_seconds > 0
    # Every expert of the other rank travels, in each micro-batch: 2 experts of q, k, v, o (64 wide), gate, up, down.
    bank = 2 * 2 * (4 * (64 + 64) + 3 * (64 + 170))
    assert result.wire["weights"] == result.wire["grad_weights"] == 2 * bank
    assert result.wire_bytes > 4 * (result.wire["weights"] * 3)


def test_the_slowest_rank_counts_and_the_median_step() -> None:
    one = {"cpu_seconds": [1.0] * 3, "peak_bytes": 5, "experts_per_token": 2.0, "wire": {"rows": 4}, "wire_bytes": 16}
    ranks = [
        one | {"seconds": [1.0, 9.0, 3.0], "busy": 16.0},
        one | {"seconds": [2.0, 1.0, 1.0], "busy": 0.0, "wire": {}},
    ]
    result = summary(replace(TINY, ranks=2), ranks)
    assert result.steps == [2.0, 9.0, 3.0] and result.seconds == 3.0 and result.cpu_seconds == 2.0
    assert result.wire == {"rows": 2.0} and result.cores_elsewhere == (16.0 - 6.0) / 14.0


def test_the_grid_varies_one_axis_at_a_time() -> None:
    cells, base = GRID.cells(), GRID.base
    assert len(set(cells)) == len(cells) and base in cells
    assert {cell.ranks for cell in cells} == {1, 2, 4}
    points = [Point(cell, measured(1.0)) for cell in cells]
    assert base_of(points) == base
    assert [p.cell.experts for p in along(points, base, "experts")] == [8, 16, 64]
    assert {p.cell.dispatch for p in along(points, base, "dispatch")} == {"auto", "all_to_all", "gather"}
    assert {p.cell.tokens_per_rank for p in weak(points, base)} == {base.tokens_per_rank}
    assert {p.cell.tokens for p in strong(points, base)} == {4 * base.tokens_per_rank}
    for series in (weak(points, base), strong(points, base)):
        assert [p.cell.ranks for p in replicated(series)] == [p.cell.ranks for p in spread(series)] == [1, 2, 4]
        assert [p.cell.ep_size for p in series if p.cell.ranks == 4] == [1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stage", "0,5"], "stage=5 is not known: choose from 0, 1, 2, 3"),
        (["--dispatch", "magic,auto"], "dispatch=magic is not known"),
        (["--ep-size", "3"], "ep_size=3 must divide ranks=2"),
        (["--experts", "8,seven"], "--experts '8,seven' must be numbers"),
        (["--hidden", "100,256"], "hidden=100 must be a multiple of 64"),
        (["--layers", "0,4"], "layers=0 must be at least 1"),
        (["--ranks", "0,2"], "ranks=0 must be at least 1"),
        (["--page-only"], "holds no study"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ldmole_dist.cli import main

    assert main(["scaling", "--output", str(tmp_path / "study"), *arguments]) == EXIT_EXPLAINED
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_study_is_on_gpus_or_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert command._on_one_kind_of_device(None, (1, 2, 4)) == [1, 2]
    with pytest.raises(UserError, match="--ranks 4 needs as many GPUs, here are 2"):
        command._on_one_kind_of_device([2, 4], (1, 2, 4))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert command._on_one_kind_of_device(None, (1, 2, 4)) == [1, 2, 4]


def test_where_nothing_is_dispatched_dispatch_is_no_axis() -> None:
    cells = grids.overridden(GRID, [1], {}).cells()
    assert {c.dispatch for c in cells} == {"auto"} and {c.ranks for c in cells} == {1}


def test_ranks_and_axes_can_be_chosen() -> None:
    grid = grids.overridden(GRID, [1, 3], {"experts": [6], "layers": [1, 3], "dispatch": ["gather"]})
    cells = grid.cells()
    assert (
        {c.ranks for c in cells} == {1, 3} and {c.experts for c in cells} == {6} and {c.layers for c in cells} >= {1, 3}
    )
    assert grid.base.dispatch == "gather"


# What it keeps


def test_an_interrupted_study_runs_only_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_row_is_read_as_it_was_written_and_half_a_row_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    rows = [
        done(TINY, measured(0.25, wire={"rows": 3.5})),
        failed(replace(TINY, layers=2), RankFailed('x\n\nError: "a, b"\n')),
    ]
    for row in rows:
        store.add(row)
    whole = store.table.read_text()
    store.add(done(replace(TINY, layers=3), measured(1.0)))
    store.table.write_text(store.table.read_text()[:-10])  # killed while it wrote
    assert Store(tmp_path, None).rows() == rows
    assert Store(tmp_path, MACHINE).rows() == rows and store.table.read_text() == whole
    assert rows[1].status == 'Error: "a, b"'
    assert failed(TINY, OSError(12, "Cannot allocate memory")).status == "OSError: [Errno 12] Cannot allocate memory"
    for cut in (5, 0):  # killed while it began
        store.table.write_text(store.table.read_text()[:cut])
        assert Store(tmp_path, None).rows() == Store(tmp_path, MACHINE).rows() == []
        assert store.table.read_text() == ",".join(COLUMNS) + "\n"


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    store.add(done(TINY, measured(0.25)))
    whole, limits = store.table.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))  # as a full disk, takes a part of the row
    try:
        with pytest.raises(
            UserError, match=r"cells\.csv cannot be written to \(File too large\).* the same command goes on"
        ):
            store.add(done(replace(TINY, layers=2), measured(0.5)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.table.stat().st_size == len(whole) + 20
    assert len(store.rows()) == 1
    again = Store(tmp_path, MACHINE)
    assert store.table.read_text() == whole
    again.add(done(replace(TINY, layers=3), measured(0.5)))
    assert [row.cell.layers for row in again.rows()] == [1, 3]
    store.latency.with_suffix(".unfinished").mkdir()
    with pytest.raises(UserError, match=r"latency\.json cannot be written to \(Is a directory\)"):
        store.add_latencies("why")
    assert store.latencies() is None


def test_the_page_is_not_lost_where_latency_fails_and_it_is_tried_again(
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
    command._measure_latency(store, thorough=False)
    assert "OutOfMemoryError" in capsys.readouterr().err
    page = said_by(Study(Store(tmp_path, None)), *sections.ALL)
    assert "This was not measured: OutOfMemoryError: tried &lt;all&gt;. The same command tries it again." in page
    raised.append(ValueError("odd"))
    command._measure_latency(Store(tmp_path, MACHINE), thorough=False)
    assert Store(tmp_path, None).latencies() == "ValueError: odd"
    for _ in range(2):
        command._measure_latency(Store(tmp_path, MACHINE), thorough=False)
        assert Store(tmp_path, None).latencies() == found and len(runs) == 3


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = GRID.cells()[:3]

    def sometimes(cell: Cell, *args: Any, **kwargs: Any) -> Measured:
        if cell == cells[1]:
            raise RankFailed("run_cell failed on rank 1:\nTraceback\nOutOfMemoryError: tried to allocate")
        return measured(1.0)

    monkeypatch.setattr(measure, "measure", sometimes)
    store = Store(tmp_path, MACHINE)
    command._measure_missing(store, cells, steps=1, timeout=1)
    assert [row.status for row in store.rows()] == ["ok", "OutOfMemoryError: tried to allocate", "ok"]
    assert "OutOfMemoryError" in capsys.readouterr().err
    monkeypatch.setattr(measure, "measure", None)  # nothing is left to run, the failed one neither
    command._measure_missing(store, cells, steps=1, timeout=1)


def test_a_cell_that_takes_too_long_is_a_failed_one(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    command._measure_missing(store, [TINY], steps=1, timeout=0.5)
    (row,) = store.rows()
    assert row.measured is None and "did not return within" in row.status


def test_a_folder_is_of_one_machine_and_version(tmp_path: Path) -> None:
    Store(tmp_path, MACHINE).add(done(TINY, measured(1.0)))
    with pytest.raises(UserError, match=r"something else \(torch 1, here 2\): choose another --output"):
        Store(tmp_path, MACHINE | {"torch": "2"})
    assert len(Store(tmp_path, None).rows()) == 1  # its page can be made anywhere
    said = r"something else \(timed_steps 7, here 5\): give --steps 7, choose another --output"
    with pytest.raises(UserError, match=said):
        Store(tmp_path, MACHINE | {"timed_steps": "5"})
    table = tmp_path / "cells.csv"
    table.write_text(table.read_text().replace("dispatch", "transport", 1))
    with pytest.raises(UserError, match="another version of this study: choose another --output"):
        Store(tmp_path, MACHINE)


def test_steps_are_recorded_and_are_those_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(measure, "measure", lambda cell, *steps: ran.append(steps) or measured(1.0))
    monkeypatch.setattr(command, "_measure_latency", lambda *_: None)
    monkeypatch.setattr("ldmole_dist.study.scaling.page.write_page", lambda store: [])
    from ldmole_dist.cli import main

    study = ["scaling", "--output", str(tmp_path), "--ranks", "1", "--layers", "1", "--timeout", "9"]
    assert main([*study, "--steps", "3"]) == 0 and set(ran) == {(3, measure.WARMUP, 9.0)}
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["timed_steps"] == "3" and machine["warmup_steps"] == str(measure.WARMUP)
    assert "the median of 3 timed steps, after 4 that warm up" in said_by(Study(Store(tmp_path, None)), sections.method)
    assert main([*study, "--steps", "4"]) == EXIT_EXPLAINED


def test_the_code_of_a_study_is_what_a_cell_runs(tmp_path: Path) -> None:
    ours = {str(path.relative_to(PACKAGE)) for path in imported(PACKAGE, MEASURED_BY)}
    assert ours >= {"method/layer.py", "parallel/dispatch.py", "engine/build.py", "study/scaling/cells.py"}
    assert ours >= {"study/bench_latency.py", "study/bench_dispatch.py", "ranks.py", "__init__.py"}
    others = ("cli.py", "cluster/", "monitor/", "checkpoint/", "study/report/", "study/plan/", "study/scaling/page.py")
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


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file.*choose a folder that can be written"):
        Store(tmp_path / "file", MACHINE)
    store = Store(tmp_path / "study", MACHINE)
    store.table.write_text(store.table.read_text() + "2,what\n")
    with pytest.raises(UserError, match=r"cells.csv, line 2 cannot be read .*: delete that line"):
        store.rows()


# Its model


@cache
def terms_of_grid() -> list[tuple[Cell, dict[str, float]]]:
    return [(cell, terms(cell, 5.9, cores=2)) for cell in GRID.cells()]


def planned_samples(rates: dict[str, float], noise: float = 0.0) -> list[tuple[Cell, Sample]]:
    random = np.random.default_rng(0)
    return [
        (cell, Sample(t, sum(rates[k] * v for k, v in t.items()) * random.uniform(1 - noise, 1 + noise)))
        for cell, t in terms_of_grid()
    ]


def test_known_rates_are_recovered() -> None:
    known = (2e-11, 5e-11, 1e-9, 5e-10, 2e-4, 4e-3, 2e-8, 0.03)
    rates = dict(zip(UNITS, known, strict=True))
    samples = planned_samples(rates)
    reasons = held_out([cell for cell, _ in samples])
    model = fit([sample for cell, sample in samples if cell not in reasons])
    for name, seconds_per in rates.items():
        assert model.seconds_per[name] == pytest.approx(seconds_per, rel=1e-3), name
    assert errors(model, [sample for cell, sample in samples if cell in reasons]).worst < 1e-3


def test_a_rate_is_never_negative() -> None:
    samples = [Sample({"a": a, "b": b}, 2 * a - 0.5 * b) for a, b in ((1.0, 1.0), (2.0, 1.0), (3.0, 4.0), (4.0, 1.0))]
    assert min(fit(samples).seconds_per.values()) == 0.0


def test_the_fit_does_not_see_what_is_held_out() -> None:
    rates = dict(zip(UNITS, (2e-11, 5e-11, 1e-9, 5e-10, 2e-4, 4e-3, 2e-8, 0.03), strict=True))
    samples = planned_samples(rates, noise=0.05)
    reasons = held_out([cell for cell, _ in samples])
    assert set(reasons.values()) == {"ranks=4", "experts=64"}
    assert all(cell in reasons for cell, _ in samples if cell.ranks == 4 or cell.experts == 64)

    def prediction(factor: float, active: float = 5.9) -> Any:
        points = []
        for cell, sample in samples:
            unseen = cell in reasons
            values = measured(sample.seconds * (factor if unseen else 1.0), experts_per_token=active if unseen else 5.9)
            points.append(Point(cell, values))
        return predict(points, cores=2)

    plain, doubled, routed_otherwise = prediction(1.0), prediction(2.0), prediction(1.0, active=1.5)
    assert routed_otherwise.samples == plain.samples and routed_otherwise.model == plain.model
    assert routed_otherwise.active_held_out == {8: 1.5, 64: 1.5}  # shown beside what was taken for it
    assert plain.model == doubled.model
    assert plain.errors()[SEEN] == doubled.errors()[SEEN]
    for kind in ("ranks=4", "experts=64"):
        assert plain.errors()[kind].worst < 0.2 and doubled.errors()[kind].median == pytest.approx(0.5, abs=0.1)
        assert any(f"held out: {kind}" in line for line in plain.lines())


def test_active_experts_are_carried_on_from_the_fitted_cells() -> None:
    def points(*active: tuple[int, float]) -> list[Point]:
        return [Point(replace(GRID.base, experts=e), measured(1.0, experts_per_token=k)) for e, k in active]

    power = fit_active(points((4, 3.0), (16, 6.0), (64, 12.0)))
    assert [power.of(e) for e in (8, 256)] == pytest.approx([3 * 2**0.5, 24.0]) and power.of(1) == 1.0
    share = fit_active(points((8, 5.0), (8, 7.2)))
    assert share.of(8) == pytest.approx(6.0) and share.of(64) == pytest.approx(48.0)
    assert fit_active(points((4, 1.0), (16, 16.0))).of(2) == 1.0  # not below one


def test_no_more_cells_than_rates_are_no_model() -> None:
    assert "1 cells that are not held out are too few" in str(predict([Point(TINY, measured(1.0))], cores=2))
    assert "0 cells that are not held out" in str(
        predict([Point(replace(TINY, ranks=2), measured(1.0)), Point(replace(TINY, experts=8), measured(1.0))], cores=2)
    )
    samples = [Sample({"a": 1.0, "b": float(n), "none": 0.0}, 1.0 + n) for n in range(3)]
    with pytest.raises(UserError, match="2 cells .* are too few to fit 2 rates"):
        fit(samples[:2])
    assert fit(samples).seconds_per == pytest.approx({"a": 1.0, "b": 1.0})  # what none of them has gets no rate
    assert fit(samples).predict({"a": 2.0, "b": 1.0, "none": 5.0}) == pytest.approx(3.0)


def test_a_rate_can_be_read_however_small() -> None:
    assert rate("trained parameters", 1e-11) == "10 ps for each parameter"
    assert rate("trained parameters", 1e-14) == "0.01 ps for each parameter"
    assert rate("constant", 0.03) == "30 ms for each step" and rate("sent by ZeRO", 5e-10) == "2 GB/s"


@pytest.mark.parametrize(("experts", "spread"), [(12, [4, 4, 4, 4]), (8, [8, 8, 8, 8]), (64, [8, 16, 32, 64]), (1, [])])
def test_the_outlook_can_be_planned_with_any_number_of_experts(experts: int, spread: list[int]) -> None:
    base = replace(GRID.base, experts=experts, ep_size=1)
    fitted = Prediction(Model(dict.fromkeys(UNITS, 1e-9)), {}, 2, ActiveExperts(1.7, 0.6), {})
    cells = fitted.outlook(base)
    assert len(set(cells)) == len(cells) and [c.ep_size for c in cells if c.ep_size > 1] == spread
    assert all(fitted.seconds(cell, None) > 0 for cell in cells)


def test_ranks_that_share_cores_take_longer_by_as_much() -> None:
    cell = replace(GRID.base, ranks=4, ep_size=4)
    apart, crowded = terms(cell, 5.9, None), terms(cell, 5.9, 2)
    assert all(crowded[name] == 2 * apart[name] for name in UNITS)
    assert terms(cell, 5.9, 4) == terms(cell, 5.9, 8) == apart


def test_the_planners_elements_are_those_that_were_counted() -> None:
    from ldmole_dist.study.plan.traffic import traffic
    from ldmole_dist.study.scaling.terms import planned

    gathers = [row for row in Store(RECORDED, None).rows() if row.cell.dispatch == "gather" and row.measured]
    assert gathers
    for row in gathers:
        assert row.measured is not None
        counted, expected = row.measured.wire, traffic(*planned(row.cell, row.measured.experts_per_token))
        assert {k: n for k, n in counted.items() if n} == {k: n for k, n in expected.items() if k in counted and n}


# Its page


def recorded(tmp_path: Path, keep: Callable[[Row], bool] = lambda row: True) -> Store:
    """A copy of the recorded study with some of its rows."""
    for name in ("machine.json", "latency.json"):
        shutil.copy(RECORDED / name, tmp_path)
    machine = json.loads((tmp_path / "machine.json").read_text())
    store = Store(tmp_path, machine)
    for row in Store(RECORDED, None).rows():
        if keep(row):
            store.add(row)
    return store


def said_by(study: Study, *chosen: Callable[[Study, Page], None]) -> str:
    """What some sections of the page say, without its plots."""
    page = Page()
    for section in chosen:
        section(study, page)
    return html.page("title", "lead", page.sections, "footer")


def test_the_page_says_whether_the_model_was_tried(tmp_path: Path) -> None:
    study = Study(recorded(tmp_path, lambda row: row.cell.ranks == 2 and row.cell.experts == 8))
    assert not isinstance(study.prediction, str)
    (line,) = study.prediction.lines()
    assert line.startswith("model, fitted to")
    page = said_by(study, sections.summary, sections.model, sections.limits)
    assert "No cell was held out" in page and "how far the model can be trusted is not known" in page
    assert "the model has to extrapolate" not in page and "errors are those of the cells held out" not in page
    assert "held-out" not in page


def test_the_page_is_one_file_that_says_what_was_measured(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    lines = write_page(store)
    assert lines[-1] == f"page: {tmp_path / 'scaling.html'}" and any("held out" in line for line in lines)
    page = (tmp_path / "scaling.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[:4] == ["Summary", "Method", "Weak scaling", "Strong scaling"] and headings[-1] == "All cells"
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and page.count("data:image/png;base64,") == 8
    rows = [row for row in Store(RECORDED, None).rows() if row.measured]
    assert f"{len(rows)} configurations were trained on CPU" in page
    for row in rows:
        assert row.measured is not None and f">{row.measured.seconds:.3f}</td>" in page
    fitted = Study(store).prediction
    assert not isinstance(fitted, str)
    for experts, active in fitted.active_held_out.items():
        assert f"{fitted.active.of(experts):.1f} for E = {experts} (measured there: {active:.1f})" in page
    two = next(row.measured for row in rows if row.cell == replace(GRID.base, ep_size=1))
    assert f"2 ranks with experts on every rank process {two.tokens_per_second:,.0f} tokens/s" in page


def test_without_one_rank_each_placement_is_compared_with_its_own_first(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    seconds = {(2, 1): 1.0, (2, 2): 4.0, (4, 1): 0.8, (4, 4): 2.0}
    grid = grids.overridden(GRID, [2, 4], {})
    for cell in [*grid.strong(), *grid.weak()]:
        if (cell.ranks, cell.ep_size) in seconds and cell not in {row.cell for row in store.rows()}:
            store.add(done(cell, measured(seconds[cell.ranks, cell.ep_size])))
    study = Study(store)
    assert speedup(study) == [
        "4 ranks with experts on every rank take 0.80 s, 2 ranks 1.00 s: 1.25 times as fast.",
        "4 ranks with the experts spread over all ranks take 2.00 s, 2 ranks 4.00 s: 2.00 times as fast.",
    ]
    assert [said.partition(": ")[2][:10] for said in throughput(study)] == ["1.25 times", "2.00 times"]
    # Ideal lines of both: seconds halve from each placement's own first; on two cores they stay.
    lines = figures.strong_scaling(study.strong, 2).axes[0].lines[2:]
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 0.5], [1.0, 1.0], [4.0, 2.0], [4.0, 4.0]]
    lines = figures.weak_scaling(study.weak, 3).axes[0].lines[2:]
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 2.0], [1.0, 1.5], [0.25, 0.5], [0.25, 0.375]]
    one = [Point(GRID.base, measured(1.0)), Point(replace(GRID.base, ranks=1, ep_size=1), measured(1.0))]
    assert len(figures.strong_scaling(sorted(one, key=lambda p: p.cell.ranks), None).axes[0].lines) == 3


def test_what_has_done_the_same_differs_by_noise(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    other = replace(GRID.base, stage=0)  # sends the same for its experts and still does something else
    rows = [(GRID.base, 1.1, 5.0), (replace(GRID.base, dispatch="all_to_all"), 3.0, 9.0), (other, 2.0, 5.0)]
    for cell, seconds, elements in rows:
        store.add(done(cell, measured(seconds, wire={"rows": elements})))
    assert Study(store).noise() == ""
    store.add(done(replace(GRID.base, dispatch="gather"), measured(1.0, wire={"rows": 5.0})))
    page = said_by(Study(store), sections.summary, sections.method, results.dispatch)
    assert "auto and gather send the same, 0.00 MB for each rank and step, and take 1.10 and 1.00 s: the 10.0%" in page
    assert "all_to_all sends" in page and "auto sends" not in page and "gather sends" not in page
    assert "2 cells that did and sent the same differed by 10.0%" in page.split("<h2>Method")[0]


def test_what_lies_between_every_rank_and_all_ranks_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    for cell in GRID.weak():
        store.add(done(cell, measured(1.0, tokens_per_second=1000.0 * cell.ranks / cell.ep_size)))
    assert placements(Study(store)) == ["4 ranks with ep_size 1, 2, 4: 4,000; 2,000; 1,000 tokens/s."]


def test_a_page_of_one_cell_claims_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    with pytest.raises(UserError, match="holds no cell that was measured"):
        write_page(store)
    store.add(failed(replace(TINY, layers=9), "RuntimeError: <no memory>"))
    store.add(done(TINY, measured(1.0)))
    (reason, _) = write_page(store)
    page = (tmp_path / "scaling.html").read_text()
    assert reason.startswith("no model was fitted: 1 cells") and page.count(reason.partition(": ")[2]) == 2
    assert "held out;" not in page
    assert "Weak scaling" not in page and "times" not in page.split("<h2>Method")[0].split("</nav>")[1]
    assert "RuntimeError: &lt;no memory&gt;" in page and "layers 9" in page


# The whole of it


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_study_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    axes = dict(ranks="1,2", experts="4", lora_rank="2", hidden="64", layers="1,2", seq="16", micro_batch="1")
    axes |= dict(dispatch="auto", stage="0,2")
    study = [sys.executable, "launch/scaling_study.py", "--output", str(tmp_path), "--steps", "1"]
    study += [part for axis, values in axes.items() for part in (f"--{axis.replace('_', '-')}", values)]
    table = tmp_path / "cells.csv"
    first = subprocess.Popen(study, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 300
        while not table.exists() or table.read_text().count("\n") < 3:
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == EXIT_PREEMPTED and "the same command goes on" in said and "Traceback" not in said
    before = table.read_text()
    assert 3 <= before.count("\n") < 8 and not (tmp_path / "scaling.html").exists()
    second = subprocess.run(study, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert second.returncode == 0, second.stderr
    assert table.read_text().startswith(before)
    rows = Store(tmp_path, None).rows()
    assert len({row.cell for row in rows}) == len(rows) > before.count("\n") - 1
    assert all(row.status == "ok" for row in rows) and {row.cell.ranks for row in rows} == {1, 2}
    assert "Strong scaling" in (tmp_path / "scaling.html").read_text() and f"page: {tmp_path}" in second.stdout
