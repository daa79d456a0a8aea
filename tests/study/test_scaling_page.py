"""Tests of the scaling study's page: its tables have the numbers of the rows."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.page import result_rows, scaling_figure, speedups, write_page
from ldmole_dist.study.scaling.rows import Row
from tests.study.scaling_rows import GRID, MACHINE, RECORDED, TINY, measured, study


def test_page_is_one_file_with_all_results(tmp_path: Path) -> None:
    shutil.copytree(RECORDED, tmp_path / "study")
    recorded = study(tmp_path / "study")
    write_page(recorded)
    page = (recorded.path / "scaling.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and page.count("data:image/png;base64,") == 1
    rows = recorded.rows()
    assert (
        f"{len(rows)} configurations were measured on CPU; 0 failed" in page and page.count("None in this study") == 1
    )
    for row in rows:
        assert row.measured is not None and f">{row.measured.seconds:.3f}</td>" in page
    assert (recorded.path / "scaling.png").stat().st_size > 1000


def test_speedups_are_relative_to_the_fewest_ranks_with_the_same_placement() -> None:
    throughput = {(2, 1): 1.0, (2, 2): 0.25, (4, 1): 1.25, (4, 2): 0.1, (4, 4): 0.5}
    results = {
        replace(GRID.base, ranks=ranks, ep_size=ep): measured(1.0, tokens_per_second=value)
        for (ranks, ep), value in throughput.items()
    }
    cells = list(results)
    ratios = {(cell.ranks, cell.ep_size): ratio for cell, ratio in speedups(results, cells).items()}
    assert ratios == {(2, 1): 1.0, (2, 2): 1.0, (4, 1): 1.25, (4, 4): 2.0}
    rows = result_rows(results, cells, ("ranks",), relative=True)
    assert [row["x tokens/s"] for row in rows] == [1.0, 1.0, 1.25, "", 2.0]
    # The ideal lines start at the first cell of each placement, and are flat beyond the cores.
    lines = scaling_figure(results, {"weak": cells}, cores=3).axes[0].lines
    assert [list(line.get_ydata()) for line in lines[1::2]] == [[1.0, 1.5], [0.25, 0.375]]
    lines = scaling_figure(results, {"weak": cells}, cores=None).axes[0].lines
    assert [list(line.get_ydata()) for line in lines[1::2]] == [[1.0, 2.0], [0.25, 0.5]]


def test_page_of_one_cell(tmp_path: Path) -> None:
    one = study(tmp_path, MACHINE)
    with pytest.raises(UserError, match="holds no measured cell"):
        write_page(one)
    one.add(Row(replace(TINY, layers=9), error="RuntimeError: <no memory>"))
    one.add(Row(TINY, measured(1.0)))
    write_page(one)
    page = (tmp_path / "scaling.html").read_text()
    assert "1 configurations were measured on CPU; 1 failed" in page and "RuntimeError: &lt;no memory&gt;" in page
