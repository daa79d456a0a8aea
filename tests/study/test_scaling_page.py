"""Tests of the scaling study's page: its tables have the numbers of the rows."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.model import Model
from ldmole_dist.study.scaling.page import result_rows, scaling_figure, write_page
from ldmole_dist.study.scaling.series import Point, speedups
from ldmole_dist.study.scaling.store import Store, done, failed
from tests.study.scaling_rows import GRID, MACHINE, RECORDED, TINY, measured


def test_page_is_one_file_with_all_results(tmp_path: Path) -> None:
    shutil.copytree(RECORDED, tmp_path / "study")
    store = Store(tmp_path / "study", None)
    model = write_page(store)
    assert isinstance(model, Model) and len(model.samples) == 3
    page = (store.path / "scaling.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and page.count("data:image/png;base64,") == 1
    rows = store.rows()
    assert f"{len(rows)} configurations were measured on CPU; 0 failed" in page and "Not measured" in page
    for row in rows:
        assert row.measured is not None and f">{row.measured.seconds:.3f}</td>" in page
    for row in model.error_rows():
        assert f">{row['median error %']}</td>" in page
    assert (store.path / "scaling.png").stat().st_size > 1000


def test_speedups_are_relative_to_the_fewest_ranks_with_the_same_placement() -> None:
    throughput = {(2, 1): 1.0, (2, 2): 0.25, (4, 1): 1.25, (4, 2): 0.1, (4, 4): 0.5}
    points = [
        Point(replace(GRID.base, ranks=ranks, ep_size=ep), measured(1.0, tokens_per_second=value))
        for (ranks, ep), value in throughput.items()
    ]
    ratios = {(cell.ranks, cell.ep_size): ratio for cell, ratio in speedups(points).items()}
    assert ratios == {(2, 1): 1.0, (2, 2): 1.0, (4, 1): 1.25, (4, 4): 2.0}
    assert [row["x tokens/s"] for row in result_rows(points, ("ranks",), relative=True)] == [1.0, 1.0, 1.25, "", 2.0]
    # The ideal lines start at the first point of each placement, and are flat beyond the cores.
    lines = scaling_figure({"weak": points}, cores=3).axes[0].lines
    assert [list(line.get_ydata()) for line in lines[1::2]] == [[1.0, 1.5], [0.25, 0.375]]
    lines = scaling_figure({"weak": points}, cores=None).axes[0].lines
    assert [list(line.get_ydata()) for line in lines[1::2]] == [[1.0, 2.0], [0.25, 0.5]]


def test_page_of_one_cell(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    with pytest.raises(UserError, match="holds no measured cell"):
        write_page(store)
    store.add(failed(replace(TINY, layers=9), RuntimeError("<no memory>")))
    store.add(done(TINY, measured(1.0)))
    store.add_latencies("OutOfMemoryError: tried <all>")
    reason = write_page(store)
    page = (tmp_path / "scaling.html").read_text()
    assert isinstance(reason, str) and reason.startswith("1 measured configurations are left") and reason in page
    assert "RuntimeError: &lt;no memory&gt;" in page and "OutOfMemoryError: tried &lt;all&gt;" in page
