"""The scaling study's page says what its rows say, and claims no more."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling import figures, grids, results, sections
from ldmole_dist.study.scaling.page import write_page
from ldmole_dist.study.scaling.series import Point
from ldmole_dist.study.scaling.store import Store, done, failed
from ldmole_dist.study.scaling.study import Study, placements, speedup, throughput
from tests.study.scaling_rows import GRID, MACHINE, RECORDED, TINY, measured, recorded, said_by


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
        "4 ranks with experts spread over all ranks take 2.00 s, 2 ranks 4.00 s: 2.00 times as fast.",
    ]
    assert [said.partition(": ")[2][:10] for said in throughput(study)] == ["1.25 times", "2.00 times"]
    # Ideal lines of both: seconds halve from each placement's own first; on two cores they stay.
    lines = figures.strong_scaling(study.strong, 2).axes[0].lines[2:]
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 0.5], [1.0, 1.0], [4.0, 2.0], [4.0, 4.0]]
    lines = figures.weak_scaling(study.weak, 3).axes[0].lines[2:]
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 2.0], [1.0, 1.5], [0.25, 0.5], [0.25, 0.375]]
    one = [Point(GRID.base, measured(1.0)), Point(replace(GRID.base, ranks=1, ep_size=1), measured(1.0))]
    assert len(figures.strong_scaling(sorted(one, key=lambda p: p.cell.ranks), None).axes[0].lines) == 3


def test_what_has_sent_the_same_tells_what_differences_say(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE)
    other = replace(GRID.base, stage=0)  # sends the same for its experts and still does something else
    rows = [(GRID.base, 1.1, 5.0), (replace(GRID.base, dispatch="all_to_all"), 3.0, 9.0), (other, 2.0, 5.0)]
    for cell, seconds, elements in rows:
        store.add(done(cell, measured(seconds, wire={"rows": elements})))
    assert Study(store).resolution() == ""
    store.add(done(replace(GRID.base, dispatch="gather"), measured(1.0, wire={"rows": 5.0})))
    page = said_by(Study(store), sections.summary, sections.method, results.dispatch)
    assert "auto and gather send the same, 0.00 MB for each rank and step, and take 1.10 and 1.00 s: the 10.0%" in page
    assert "all_to_all sends" in page and "auto sends" not in page and "gather sends" not in page
    assert "2 cells that sent the same differed by 10.0%" in page.split("<h2>Method")[0]


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
