"""Tests of the scaling study's cells, grids and command."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PREEMPTED, UserError
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.scaling import grids
from ldmole_dist.study.scaling.command import _cells
from ldmole_dist.study.scaling.measure import run_cell, summary
from ldmole_dist.study.scaling.series import along, base_of, strong, weak
from tests.study.scaling_rows import GRID, TINY, study

ROOT = Path(__file__).parents[2]


def test_a_cell_is_trained_and_measured(ranks2: LocalRanks) -> None:
    cell = replace(TINY, ranks=2, ep_size=2, accumulation=2, dispatch="gather")
    result = summary(cell, ranks2.run(run_cell, cell, 3, 1))
    assert len(result.steps) == 3 and min(result.steps) <= result.seconds <= max(result.steps)
    assert result.tokens_per_second == pytest.approx(2 * 2 * 16 / result.seconds)
    assert 1 <= result.experts_per_token <= 4 and result.peak_bytes > 0 and result.cpu_seconds > 0
    # Every expert of the other rank is fetched in each micro-batch: 2 experts of q, k, v, o (64 wide), gate, up, down.
    bank = 2 * 2 * (4 * (64 + 64) + 3 * (64 + 170))
    # The forward, the recomputation and the gradients send them; the row counts are small.
    assert 3 <= result.wire_bytes / (4 * 2 * bank) < 3.1


def test_time_is_the_median_step_of_the_slowest_rank() -> None:
    one = {"cpu_seconds": [1.0] * 3, "peak_bytes": 5, "experts_per_token": 2.0, "wire_bytes": 16}
    ranks = [
        one | {"seconds": [1.0, 9.0, 3.0], "busy": 16.0},
        one | {"seconds": [2.0, 1.0, 1.0], "busy": 0.0, "wire_bytes": 0},
    ]
    result = summary(replace(TINY, ranks=2), ranks)
    assert result.steps == [2.0, 9.0, 3.0] and result.seconds == 3.0 and result.cpu_seconds == 2.0
    assert result.wire_bytes == 8.0 and result.cores_elsewhere == (16.0 - 6.0) / 14.0


def test_grid_varies_one_axis_at_a_time() -> None:
    cells, base = GRID.cells(), GRID.base
    assert len(set(cells)) == len(cells) and base in cells
    assert {cell.ranks for cell in cells} == {1, 2, 4}
    assert base_of(cells) == base
    assert [cell.experts for cell in along(cells, base, "experts")] == [8, 16, 64]
    assert {cell.dispatch for cell in along(cells, base, "dispatch")} == {"auto", "all_to_all", "gather"}
    assert {cell.tokens // cell.ranks for cell in weak(cells, base)} == {base.tokens // base.ranks}
    assert {cell.tokens for cell in strong(cells, base)} == {2 * base.tokens}
    for series in (weak(cells, base), strong(cells, base)):
        assert [(cell.ranks, cell.ep_size) for cell in series] == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    alone = along(cells, replace(base, ranks=1, ep_size=1), "experts")
    assert [cell.experts for cell in alone] == [8, 64]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stage", "0,5"], "stage=5 is not supported; use one of 0, 1, 2, 3"),
        (["--dispatch", "magic,auto"], "dispatch=magic is not supported"),
        (["--ep-size", "3"], "ep_size=3 must divide both ranks=2"),
        (["--experts", "8,seven"], "--experts '8,seven' is not a list of integers"),
        (["--hidden", "100,256"], "hidden=100 is not a multiple of 64"),
        (["--layers", "0,4"], "layers=0 is not positive"),
        (["--ranks", "0,2"], "ranks=0 is not positive"),
        (["--page-only"], "holds no study"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_runs(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ldmole_dist.cli import main

    assert main(["scaling", "--output", str(tmp_path / "study"), *arguments]) == EXIT_EXPLAINED
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_all_cells_are_on_gpus_or_all_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def ranks(asked: dict[str, list[int]]) -> set[int]:
        return {cell.ranks for cell in _cells(False, asked)}

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert ranks({}) == {1, 2}
    with pytest.raises(UserError, match="--ranks 4 exceeds the 2 GPUs"):
        ranks({"ranks": [2, 4]})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert ranks({}) == {1, 2, 4}


def test_dispatch_is_not_varied_without_expert_parallelism() -> None:
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
def test_interrupted_study_is_resumed(tmp_path: Path) -> None:
    axes = dict(ranks="1,2", experts="4", lora_rank="2", hidden="64", layers="1", seq="16", micro_batch="1")
    axes |= dict(dispatch="auto", stage="2")  # 4 cells
    command = [sys.executable, "launch/scaling_study.py", "--output", str(tmp_path), "--steps", "1"]
    command += [part for axis, values in axes.items() for part in (f"--{axis.replace('_', '-')}", values)]
    table = tmp_path / "cells.jsonl"
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 300
        while not table.exists() or table.read_text().count("\n") < 1:
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        _, message = first.communicate(timeout=60)
    finally:
        first.kill()
    assert (
        first.returncode == EXIT_PREEMPTED
        and "run the same command again to resume" in message
        and "Traceback" not in message
    )
    before = table.read_text()
    assert 1 <= before.count("\n") < 4 and not (tmp_path / "scaling.html").exists()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert second.returncode == 0, second.stderr
    assert table.read_text().startswith(before)
    rows = study(tmp_path).rows()
    assert len({row.cell for row in rows}) == len(rows) > before.count("\n")
    assert all(row.error is None for row in rows) and {row.cell.ranks for row in rows} == {1, 2}
    assert (tmp_path / "scaling.html").exists() and f"page: {tmp_path}" in second.stdout
