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
from ldmole_dist.study.scaling.cells import AXES
from ldmole_dist.study.scaling.model import Model, fit_model
from ldmole_dist.study.scaling.series import PLACEMENTS, Point, along, base_of, speedups, strong, weak
from ldmole_dist.study.scaling.store import Store
from ldmole_dist.study.table import Rows, text_of

SIZES = ("experts", "lora_rank", "layers", "hidden", "seq")


def write_page(store: Store) -> Model | str:
    """Write scaling.html, and its figure as scaling.png, to the folder of a study.

    Args:
        store: folder of the study.

    Returns:
        The fitted model; a string with the reason if no model can be fitted.

    Raises:
        UserError: if no cell was measured successfully, a stored file cannot be read, or the folder cannot be written.
    """
    rows, machine, latencies = store.rows(), store.about, store.latencies()
    points = [Point(row.cell, row.measured) for row in rows if row.measured is not None]
    if not points:
        raise UserError(
            f"{store.table} holds no measured cell; fix the errors in its column status, delete these lines and run "
            "the study again"
        )
    # None: each rank has its own GPU. On a CPU, all ranks share the cores.
    cores = int(machine["cores"]) if machine["device"] == "CPU" else None
    base = base_of(points)
    over_ranks = {"weak scaling": weak(points, base), "strong scaling": strong(points, base)}
    # Sizes are also compared on one rank, where the times contain no communication.
    alone = next((p.cell for p in over_ranks["weak scaling"] if p.cell.ranks == 1), base)
    sizes = [p for axis in SIZES for cell in (alone, base) for p in along(points, cell, axis)]
    dispatch = along(points, base, "dispatch")
    if base.ep_size > 1:
        weak_points = over_ranks["weak scaling"]
        dispatch += [p for p in weak_points if p.cell.ranks == base.ranks and p.cell.ep_size == 1]
    failed = [{**asdict(row.cell), "error": row.status} for row in rows if row.measured is None]
    elsewhere = [p.measured.cores_elsewhere for p in points]
    tables: dict[str, Rows] = {
        "machine": [{"measured on": name, "": value} for name, value in machine.items()],
        "base": [asdict(base)],
        "busy": [{"median cores": statistics.median(elsewhere), "most": max(elsewhere)}],
        "weak": result_rows(over_ranks["weak scaling"], ("ranks", "ep_size"), relative=True),
        "strong": result_rows(over_ranks["strong scaling"], ("ranks", "ep_size", "accumulation"), relative=True),
        "sizes": result_rows(sizes, ("ranks", *SIZES)),
        "dispatch": result_rows(dispatch, ("dispatch", "ep_size")),
        "stages": result_rows(along(points, base, "stage"), ("stage",)),
        "latency": [latency.row() for latency in latencies] if isinstance(latencies, list) else [],
        "failed": failed,
        "all": result_rows(points, AXES),
    }
    model: Model | str
    try:
        model = fit_model(points, cores)
    except UserError as error:
        model = str(error)
        tables |= {"errors": [], "rates": []}
    else:
        tables |= {"errors": model.error_rows(), "rates": model.rate_rows()}
    with matplotlib.rc_context(style.STYLE):
        png = style.png(scaling_figure(over_ranks, cores))
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        {f"{name}_table": _table(table) for name, table in tables.items()}
        | {
            "figure": base64.b64encode(png).decode(),
            "measured": len(points),
            "failed": len(failed),
            "device": escape(machine["device"]),
        }
        | {"no_model": escape(model) if isinstance(model, str) else ""}
        | {"no_latency": escape(latencies) if isinstance(latencies, str) else ""}
    )
    with write_errors(f"the page in {store.path}"):
        atomic_write(store.path / "scaling.png", png)
        atomic_write(store.path / "scaling.html", page)
    return model


def result_rows(points: Sequence[Point], axes: Sequence[str], relative: bool = False) -> list[dict[str, object]]:
    """Return one table row per distinct cell, with its settings and its results.

    Args:
        points: measured cells; with `relative`, ordered by number of ranks.
        axes: names of the settings to show.
        relative: whether to add the column "x tokens/s" with the result of `speedups`.
    """
    ratios = speedups(points) if relative else {}
    rows: list[dict[str, object]] = []
    for cell, m in {p.cell: p for p in points}.values():
        row = {axis: getattr(cell, axis) for axis in axes}
        row |= {"step s": f"{m.seconds:.3f}", "fastest s": f"{min(m.steps):.3f}", "slowest s": f"{max(m.steps):.3f}"}
        row |= {"tokens/s": m.tokens_per_second, **({"x tokens/s": ratios.get(cell, "")} if relative else {})}
        row |= {"CPU s, all ranks": f"{m.cpu_seconds:.3f}", "sent for experts MB": f"{m.wire_bytes / 1e6:.2f}"}
        rows.append(row | {"peak MB": f"{m.peak_bytes / 1e6:,.0f}"})
    return rows


def scaling_figure(series: Mapping[str, Sequence[Point]], cores: int | None) -> Figure:
    """Plot tokens per second against the number of ranks.

    Each panel has a line per placement of the experts, and a dashed line for ideal scaling from the fewest ranks.

    Args:
        series: title of a panel -> its points, ordered by number of ranks.
        cores: number of CPU cores that the ranks share; the ideal line is flat beyond it. None if each rank has a GPU.
    """
    figure, every = style.panels(len(series), 4.0)
    for axes, (title, points) in zip(every, series.items(), strict=True):
        ranks = sorted({p.cell.ranks for p in points})
        usable = {n: min(n, cores or n) for n in ranks}
        for index, (label, has_placement) in enumerate(PLACEMENTS.items()):
            chosen = [p for p in points if has_placement(p.cell)]
            x, y = [p.cell.ranks for p in chosen], [p.measured.tokens_per_second for p in chosen]
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
    """Return an HTML table, or a paragraph that says so if the study has no rows for it."""
    if not rows:
        return "<p>Not measured in this study.</p>"
    return html.Table(list(rows[0]), [[text_of(value) for value in row.values()] for row in rows]).html()
