"""Write the page of a scaling study: page.html has the text, and its tables and figure are computed from the rows."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from string import Template

import matplotlib
from matplotlib.figure import Figure

from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_write, write_errors
from ldmole_dist.report import html, style
from ldmole_dist.study.folder import StudyFolder
from ldmole_dist.study.scaling.cells import AXES, SIZES, Cell
from ldmole_dist.study.scaling.measure import Measured
from ldmole_dist.study.scaling.rows import Row
from ldmole_dist.study.scaling.series import PLACEMENTS, along, base_of, strong, weak
from ldmole_dist.study.table import Rows, text_of

Results = Mapping[Cell, Measured]


def write_page(study: StudyFolder[Row]) -> None:
    """Write scaling.html, and its figure as scaling.png, to the folder of a study.

    Args:
        study: folder of the study.

    Raises:
        UserError: if no cell was measured successfully, a stored file cannot be read, or the folder cannot be written.
    """
    rows, machine = study.rows(), study.about
    results = {row.cell: row.measured for row in rows if row.measured is not None}
    if not results:
        raise UserError(
            f"{study.table} holds no measured cell; fix the errors that it lists, if any, delete their lines and measure again"
        )
    cells = list(results)
    base = base_of(cells)
    over_ranks = {"weak scaling": weak(cells, base), "strong scaling": strong(cells, base)}
    # Sizes are also compared on one rank, where the times contain no communication.
    alone = next((cell for cell in over_ranks["weak scaling"] if cell.ranks == 1), base)
    sizes = [cell for axis in SIZES for around in (alone, base) for cell in along(cells, around, axis)]
    dispatch = along(cells, base, "dispatch")
    if base.ep_size > 1:
        dispatch += [cell for cell in over_ranks["weak scaling"] if cell.ranks == base.ranks and cell.ep_size == 1]
    failed = [{**asdict(row.cell), "error": row.error} for row in rows if row.measured is None]
    elsewhere = [measured.cores_elsewhere for measured in results.values()]
    tables: dict[str, Rows] = {
        "machine": [{"measured on": name, "": value} for name, value in machine.items()],
        "base": [asdict(base)],
        "busy": [{"median cores": statistics.median(elsewhere), "most": max(elsewhere)}],
        "weak": result_rows(results, over_ranks["weak scaling"], ("ranks", "ep_size"), relative=True),
        "strong": result_rows(
            results, over_ranks["strong scaling"], ("ranks", "ep_size", "accumulation"), relative=True
        ),
        "sizes": result_rows(results, sizes, ("ranks", *SIZES)),
        "dispatch": result_rows(results, dispatch, ("dispatch", "ep_size")),
        "stages": result_rows(results, along(cells, base, "stage"), ("stage",)),
        "failed": failed,
        "all": result_rows(results, cells, AXES),
    }
    # None: each rank has its own GPU. On a CPU, all ranks share the cores.
    cores = int(machine["cores"]) if machine["device"] == "CPU" else None
    with matplotlib.rc_context(style.STYLE):
        png = style.png(scaling_figure(results, over_ranks, cores))
    page = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        {f"{name}_table": _table(table) for name, table in tables.items()},
        figure=base64.b64encode(png).decode(),
        measured=len(results),
        failed=len(failed),
        device=escape(machine["device"]),
    )
    with write_errors(f"the page in {study.path}"):
        atomic_write(study.path / "scaling.png", png)
        atomic_write(study.path / "scaling.html", page)


def result_rows(results: Results, cells: Sequence[Cell], axes: Sequence[str], relative: bool = False) -> Rows:
    """Return one table row per distinct cell, with its settings and its results.

    Args:
        results: results of every cell.
        cells: cells to show; with `relative`, ordered by number of ranks.
        axes: names of the settings to show.
        relative: whether to add the column "x tokens/s" with the result of `speedups`.
    """
    ratios = speedups(results, cells) if relative else {}
    rows: list[dict[str, object]] = []
    for cell in dict.fromkeys(cells):
        m = results[cell]
        row = {axis: getattr(cell, axis) for axis in axes}
        row |= {"step s": f"{m.seconds:.3f}", "fastest s": f"{min(m.steps):.3f}", "slowest s": f"{max(m.steps):.3f}"}
        row |= {"tokens/s": m.tokens_per_second, **({"x tokens/s": ratios.get(cell, "")} if relative else {})}
        row |= {"CPU s, all ranks": f"{m.cpu_seconds:.3f}", "experts per token": m.experts_per_token}
        row |= {"sent for experts MB": f"{m.wire_bytes / 1e6:.2f}", "peak MB": f"{m.peak_bytes / 1e6:,.0f}"}
        rows.append(row)
    return rows


def speedups(results: Results, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Return the throughput of each cell relative to the fewest ranks with the same placement of the experts.

    Args:
        results: results of every cell.
        cells: cells, ordered by number of ranks.

    Returns:
        Cell -> ratio. Cells whose placement is not in `PLACEMENTS` are missing.
    """
    ratios: dict[Cell, float] = {}
    for has_placement in PLACEMENTS.values():
        series = [cell for cell in cells if has_placement(cell)]
        for cell in series:
            ratio = results[cell].tokens_per_second / results[series[0]].tokens_per_second
            ratios.setdefault(cell, ratio)
    return ratios


def scaling_figure(results: Results, series: Mapping[str, Sequence[Cell]], cores: int | None) -> Figure:
    """Plot tokens per second against the number of ranks.

    Each panel has two lines per placement of the experts: its results, and ideal scaling from its fewest
    ranks (dashed).

    Args:
        results: results of every cell.
        series: title of a panel -> its cells, ordered by number of ranks.
        cores: number of CPU cores that the ranks share; the ideal line is flat beyond it. None if each rank has a GPU.
    """
    figure, every = style.panels(len(series), 4.0)
    for axes, (title, cells) in zip(every, series.items(), strict=True):
        ranks = sorted({cell.ranks for cell in cells})
        usable = {n: min(n, cores or n) for n in ranks}
        for index, (label, has_placement) in enumerate(PLACEMENTS.items()):
            chosen = [cell for cell in cells if has_placement(cell)]
            x, y = [cell.ranks for cell in chosen], [results[cell].tokens_per_second for cell in chosen]
            axes.plot(x, y, label=label, **style.line_style(index))
            if chosen:
                ideal = [y[0] * usable[n] / usable[x[0]] for n in ranks]
                axes.plot(ranks, ideal, "--", color="black", linewidth=0.9, label=f"ideal, {label}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="ranks", ylabel="tokens per second, all ranks", title=title)
        axes.legend()
    return figure


def _table(rows: Rows) -> str:
    """Return an HTML table of the rows; if there are none, a paragraph that says so."""
    if not rows:
        return "<p>None in this study.</p>"
    return html.Table(list(rows[0]), [[text_of(value) for value in row.values()] for row in rows]).html()
