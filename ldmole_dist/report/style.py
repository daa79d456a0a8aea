"""Style and building blocks of the report's figures: colors, sizes, panels, line plots, heat maps and PNG output."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ldmole_dist.monitor.linears import Linears

# Palette of Okabe and Ito for color-blind readers, without its yellow, which is too light for lines.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINES = ["-", "--", ":", "-."]
GREY = "#777777"
MISSING = "#D9D9D9"  # non-finite elements of a heat map
DIVERGING = "PuOr_r"  # purple below the center, white at the center, orange above
SEQUENTIAL = "cividis"
STYLE: dict[Any, Any] = {
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
WIDTH = 12.0  # inches
DPI = 130


def png(figure: Figure) -> bytes:
    """Return the contents of a PNG file of the figure. Equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def panels(count: int, height: float, columns: int = 4, **options: Any) -> tuple[Figure, list[Axes]]:
    """Create a figure with a grid of panels.

    Args:
        count: Number of panels.
        height: Height of each row in inches.
        columns: Maximum number of panels in a row.
        options: Keyword arguments of `Figure.subplots`.

    Returns:
        The figure, and the axes of its `count` panels.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, rows * height), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06))
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    for ax in axes[:count]:
        ax.tick_params(labelbottom=True)  # sharex hides the tick labels, even if the panel below is unused
    return figure, axes[:count]


def line_style(index: int) -> dict[str, Any]:
    """Return the keyword arguments of `Axes.plot` for line number `index`: color, marker and line style.

    Colors and markers repeat after each pass through the palette, with the next line style.
    """
    n = len(PALETTE)
    return {"color": PALETTE[index % n], "marker": MARKERS[index % n], "linestyle": LINES[index // n % len(LINES)]}


def plot_lines(ax: Axes, title: str, x: Sequence[float] | np.ndarray, lines: Mapping[str, Iterable[float]]) -> None:
    """Plot one labeled line per entry of `lines`.

    Args:
        ax: Axes to draw into.
        title: Title of the axes.
        x: Common x values; with more than 40, lines have no markers.
        lines: Label -> y values, for all x or only for the first ones.
    """
    for index, (label, values) in enumerate(lines.items()):
        y = list(values)
        style = line_style(index) if len(x) <= 40 else line_style(index) | {"marker": None}
        ax.plot(x[: len(y)], y, label=label, **style)
    ax.set_title(title)


def legend_above(figure: Figure, ax: Axes, title: str | None = None) -> None:
    """Add a legend for the lines of `ax` above all panels, and increase the figure's height accordingly."""
    handles, labels = ax.get_legend_handles_labels()
    columns = min(7, len(labels))
    rows = -(-len(labels) // columns) + (title is not None)
    figure.set_size_inches(WIDTH, figure.get_figheight() + 0.1 + 0.25 * rows)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, title=title)


def heat_map(ax: Axes, values: np.ndarray, **options: Any) -> AxesImage:
    """Draw a matrix as a heat map and return its image. Non-finite elements are grey.

    Args:
        ax: Axes to draw into.
        values: (rows, columns).
        options: Keyword arguments of `Axes.imshow`.
    """
    image = ax.imshow(np.ma.masked_invalid(values), interpolation="nearest", **options)
    ax.set_facecolor(MISSING)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=GREY)
    return image


def log2_limit(values: Iterable[np.ndarray], least: float, most: float) -> float:
    """Return the limit of a symmetric color scale from -limit to limit for binary logarithms.

    The limit is the largest absolute value, clipped to the range from `least` to `most`.

    Args:
        values: Arrays that share the scale; non-finite elements are ignored.
        least: Minimum of the limit.
        most: Maximum of the limit.
    """
    every = np.abs(np.concatenate([array.ravel() for array in values]))
    return float(np.clip(max(every[np.isfinite(every)], default=least), least, most))


def log2_colorbar(figure: Figure, axes: Sequence[Axes], image: AxesImage, limit: float, label: str) -> None:
    """Add a color bar for an image of binary logarithms from `-limit` to `limit`, labeled with the ratios 2^value."""
    ticks = np.linspace(-limit, limit, 5)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, aspect=30)
    bar.set_ticks(list(ticks), labels=[f"{2**t:.3g}" for t in ticks])
    bar.set_label(label)


def layer_ticks(axis: Any, linears: Linears, most: int = 9) -> None:
    """Set the ticks of an axis to layer numbers, with at most `most` ticks."""
    labels = linears.layer_labels()
    shown = range(0, len(labels), -(-len(labels) // most))
    axis.set_ticks(list(shown), [labels[i] for i in shown])


def expert_ticks(axis: Any, experts: int, most: int = 8) -> None:
    """Set the ticks of an axis to expert numbers, with at most `most` ticks."""
    axis.set_ticks(range(0, experts, -(-experts // most)))
