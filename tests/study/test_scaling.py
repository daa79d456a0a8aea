"""The scaling study runs the cells that it says, and goes on where it was interrupted."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PREEMPTED, UserError
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.scaling import command, grids
from ldmole_dist.study.scaling.measure import run_cell, summary
from ldmole_dist.study.scaling.series import Point, along, base_of, replicated, spread, strong, weak
from ldmole_dist.study.scaling.store import Store
from tests.study.scaling_rows import GRID, TINY, measured

ROOT = Path(__file__).parents[2]


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
