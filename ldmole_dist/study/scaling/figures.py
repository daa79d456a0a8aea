"""The study's plots, one function a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ldmole_dist.study.bench.latency import Latency
from ldmole_dist.study.scaling.series import PLACEMENTS, Point

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#718096", "#b7791f")
Sample = tuple[float, float]  # measured seconds, predicted seconds


def weak_scaling(points: Sequence[Point], cores: int | None) -> Figure:
    """Tokens per second over ranks; `cores` where ranks share so many."""
    figure, (axes,) = _panels(1)
    _placements(axes, points, "tokens_per_second")
    ranks = sorted({p.cell.ranks for p in points})
    for n0, first in _firsts(points, "tokens_per_second"):
        shared = [first * min(n, cores) / min(n0, cores) for n in ranks] if cores else None
        _ideal(axes, ranks, [first * n / n0 for n in ranks], shared)
    _over_ranks(axes, ranks, "tokens per second, all ranks", "Weak scaling: tokens of a rank fixed")
    return figure


def strong_scaling(points: Sequence[Point], cores: int | None) -> Figure:
    """Seconds per optimizer step over ranks, the batch fixed."""
    figure, (axes,) = _panels(1)
    _placements(axes, points, "seconds")
    ranks = sorted({p.cell.ranks for p in points})
    for n0, first in _firsts(points, "seconds"):
        shared = [first * min(n0, cores) / min(n, cores) for n in ranks] if cores else None
        _ideal(axes, ranks, [first * n0 / n for n in ranks], shared)
    _over_ranks(axes, ranks, "seconds per optimizer step", "Strong scaling: batch fixed")
    return figure


def by_axis(series: Mapping[str, Mapping[str, Sequence[Point]]]) -> Figure:
    """Seconds per optimizer step, a panel for each axis and a line for each number of ranks.

    Args:
        series: axis to label to points.
    """
    figure, panels = _panels(len(series))
    for axes, (axis, lines) in zip(panels, series.items(), strict=True):
        values = sorted({getattr(p.cell, axis) for points in lines.values() for p in points})
        for (label, points), colour in zip(lines.items(), COLOURS, strict=False):
            x = [getattr(p.cell, axis) for p in points]
            axes.plot(x, [p.measured.seconds for p in points], marker="o", color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_ylim(0, 1.1 * max(p.measured.seconds for points in lines.values() for p in points))
        axes.set(xlabel=NAMES.get(axis, axis), ylabel="seconds per optimizer step")
        axes.legend()
    return figure


NAMES = {
    "experts": "experts of a linear (E)",
    "lora_rank": "LoRA rank of an expert (r)",
    "layers": "decoder layers",
    "hidden": "hidden width",
    "seq": "tokens of a sequence",
}


def bars(labels: Sequence[str], panels: Mapping[str, Sequence[float]]) -> Figure:
    """A panel of bars for each quantity.

    Args:
        labels: of the bars.
        panels: quantity with its unit to values.
    """
    figure, every = _panels(len(panels))
    for axes, (quantity, values), colour in zip(every, panels.items(), COLOURS, strict=False):
        drawn = axes.bar(labels, values, color=colour, width=0.6)
        axes.bar_label(drawn, fmt="{:.3g}", padding=2)
        axes.margins(y=0.15)
        axes.set_ylabel(quantity)
    return figure


def latency_shares(results: Sequence[Latency]) -> Figure:
    """Shares of the whole, a panel for each shape and phase."""
    kinds = list(dict.fromkeys((r.shape, r.phase) for r in results))
    figure, panels = _panels(len(kinds), columns=2)
    for axes, (shape, phase) in zip(panels, kinds, strict=True):
        chosen = [r for r in results if (r.shape, r.phase) == (shape, phase)]
        labels = [str(r.batch) for r in chosen]
        above, below = [0.0] * len(chosen), [0.0] * len(chosen)
        for name, colour in zip(chosen[0].shares(), COLOURS, strict=True):
            shares = [100 * r.shares()[name] for r in chosen]
            bottom = [a if s >= 0 else b for a, b, s in zip(above, below, shares, strict=True)]
            axes.bar(labels, shares, bottom=bottom, color=colour, label=name, width=0.7)
            above = [a + max(s, 0) for a, s in zip(above, shares, strict=True)]
            below = [b + min(s, 0) for b, s in zip(below, shares, strict=True)]
        axes.axhline(100, color="black", linewidth=0.8)
        axes.axhline(0, color="black", linewidth=0.8)
        unit = "sequences of a batch" if phase == "training" else "sequences decoded together"
        axes.set(title=f"{shape}: {phase}", xlabel=unit, ylabel="% of the whole")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def predictions(kinds: Mapping[str, Sequence[Sample]]) -> Figure:
    """Predicted against measured seconds.

    Args:
        kinds: label to (measured, predicted) of its cells.
    """
    figure, (axes,) = _panels(1)
    for (label, samples), colour, marker in zip(kinds.items(), COLOURS, "o^sDv", strict=False):
        axes.scatter(*zip(*samples, strict=True), color=colour, marker=marker, label=label, zorder=3)
    every = [value for samples in kinds.values() for sample in samples for value in sample if value > 0]
    ends = [0.8 * min(every), 1.25 * max(every)]
    axes.plot(ends, ends, color="black", linewidth=0.8, label="predicted = measured")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set(xlabel="measured seconds per optimizer step", ylabel="predicted seconds")
    axes.legend()
    return figure


def _panels(number: int, columns: int = 3) -> tuple[Figure, list[Any]]:
    columns = min(number, columns)
    rows = -(-number // columns)
    figure = Figure(figsize=(6.4 if number == 1 else 4.8 * columns, 3.8 * rows), layout="constrained")
    panels = [figure.add_subplot(rows, columns, position + 1) for position in range(number)]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _xy(points: Sequence[Point], quantity: str) -> tuple[list[int], list[float]]:
    return [p.cell.ranks for p in points], [getattr(p.measured, quantity) for p in points]


def _placements(axes: Any, points: Sequence[Point], quantity: str) -> None:
    for (label, series), colour, marker in zip(PLACEMENTS, COLOURS, "os", strict=False):
        axes.plot(*_xy(series(points), quantity), marker=marker, color=colour, label=label)


def _firsts(points: Sequence[Point], quantity: str) -> list[tuple[int, float]]:
    """Where each series begins, which its ideal does too; one rank has all experts, and begins both."""
    series = [_xy(chosen(points), quantity) for _, chosen in PLACEMENTS]
    return list(dict.fromkeys((x[0], y[0]) for x, y in series if x))


def _ideal(axes: Any, ranks: list[int], ideal: list[float], shared: list[float] | None) -> None:
    axes.plot(ranks, ideal, linestyle="--", color="black", linewidth=0.9, label="ideal")
    if shared and shared != ideal:
        axes.plot(ranks, shared, linestyle=":", color="black", label="ideal on the cores that there are")


def _over_ranks(axes: Any, ranks: list[int], quantity: str, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.set_ylim(0, 1.05 * max(max(line.get_ydata()) for line in axes.lines))
    axes.set(xlabel="ranks", ylabel=quantity, title=title)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # there is an ideal of each placement
    axes.legend(once.values(), once.keys())
