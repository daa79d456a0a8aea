"""How the report's figures look: colours that the colour-blind can tell apart, sizes, axes by layer, PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ldmole_dist.monitor.linears import Linears

# Okabe and Ito's palette without its yellow, which is too light for lines.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINES = ["-", "--", ":", "-."]
GREY = "#777777"
MISSING = "#D9D9D9"
AROUND_A_CENTRE = "PuOr_r"  # purple below, white at, orange above
FROM_ZERO = "cividis"
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
WIDTH = 12.0  # inches of a figure
DPI = 130


def styled() -> Any:
    """A context in which figures are drawn and written in this style."""
    return matplotlib.rc_context(STYLE)


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    # Without a date and a version: the same data gives the same file.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and, once the colours have been used, another line."""
    n = len(PALETTE)
    return {
        "color": PALETTE[index % n],
        "marker": MARKERS[index % n],
        "linestyle": LINES[index // n % len(LINES)],
    }


def panels(count: int, height: float, columns: int = 4, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each `height` inches high.

    Args:
        count: of panels.
        height: of each row.
        columns: at most.
        options: for `Figure.subplots`.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, rows * height), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06))
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    for ax in axes[:count]:
        ax.tick_params(labelbottom=True)  # also where the axis below is shared, or there is none
    return figure, axes[:count]


def layer_ticks(axis: Any, linears: Linears, most: int = 9) -> None:
    """Mark layers on an axis whose positions are 0, 1, 2, ...: not more labels than can be read."""
    labels = linears.layer_labels()
    shown = range(0, len(labels), -(-len(labels) // most))
    axis.set_ticks(list(shown), [labels[i] for i in shown])


def map_axes(axes: Axes) -> None:
    """A heat map has no grid and a whole frame."""
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GREY)


def expert_ticks(axis: Any, experts: int, most: int = 8) -> None:
    """Mark experts, from 0."""
    axis.set_ticks(range(0, experts, -(-experts // most)))


def log2_limit(values: np.ndarray | Sequence[float], least: float, most: float) -> float:
    """Half the range of a colour scale of binary logarithms."""
    finite = np.abs(np.asarray(values, dtype=float))
    finite = finite[np.isfinite(finite)]
    return float(np.clip(finite.max() if len(finite) else least, least, most))
