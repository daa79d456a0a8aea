"""Draw figures by layer and projection: lambda, experts per token and load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ldmole_dist.monitor.linears import Linears, as_table
from ldmole_dist.report import style

Summaries = Mapping[str, Mapping[str, Any]]  # name of a linear -> result of `statistics.summarize`


def has_lambda(summaries: Summaries) -> bool:
    """Return whether the summaries contain lambda; some routers have none."""
    return all("lambda_mean" in summary for summary in summaries.values())


def max_experts(summaries: Summaries) -> int:
    """Return the largest number of experts of any linear."""
    return max(len(summary["load"]) for summary in summaries.values())


def lambda_by_layer(linears: Linears, summaries: Summaries) -> Figure:
    """Plot mean and standard deviation of lambda over tokens by layer; projections with equal means share a panel."""
    means = {p: linears.values(p, lambda n: summaries[n]["lambda_mean"]) for p in linears.projections}
    stds = {p: linears.values(p, lambda n: summaries[n]["lambda_std"]) for p in linears.projections}
    # Projections that read the same tensor have the same lambda: draw them in one panel.
    groups: dict[bytes, list[str]] = {}
    for projection in linears.projections:
        groups.setdefault(means[projection].tobytes(), []).append(projection)
    figure, axes = style.panels(len(groups), 3.2, sharex=True, sharey=True)
    x = np.arange(len(linears.layers))
    for group, ax in zip(groups.values(), axes, strict=True):
        mean, std = means[group[0]], stds[group[0]]
        line = style.line_style(linears.projections.index(group[0]))
        ax.fill_between(x, mean - std, mean + std, color=line["color"], alpha=0.22, linewidth=0)
        if len(x) == 1:  # a band around a single point is invisible
            ax.errorbar(x, mean, std, color=line["color"], capsize=6)
        ax.plot(x, mean, **line)
        ax.set_title(", ".join(group))
        style.layer_ticks(ax.xaxis, linears, most=8)
        ax.set_xlabel("layer")
    axes[0].set_ylabel("λ")
    return figure


def experts_by_layer(linears: Linears, summaries: Summaries) -> Figure:
    """Plot the mean number of active experts per token by layer, one line per projection."""
    experts = max_experts(summaries)
    figure = Figure(figsize=(style.WIDTH, 4.6), layout="constrained")
    ax = figure.subplots()
    lines = {p: linears.values(p, lambda n: summaries[n]["experts_per_token"]) for p in linears.projections}
    style.plot_lines(ax, "", np.arange(len(linears.layers)), lines)
    means = [summary["experts_per_token"] for summary in summaries.values()]
    top = max(means)
    if top > experts / 2:
        ax.axhline(experts, color=style.GREY, linewidth=1, linestyle="--", label=f"all experts ({experts})")
        top = experts
    ax.set_ylim(min(1.0, *means) - 0.03 * top, 1.04 * top)
    ax.set_xlabel("layer")
    ax.set_ylabel("active experts per token")
    style.layer_ticks(ax.xaxis, linears, most=20)
    figure.legend(loc="outside right upper", title="projection", alignment="left")
    return figure


def experts_histogram(linears: Linears, summaries: Summaries) -> Figure:
    """Plot the distribution of active experts per token, averaged over layers, in one panel per projection."""
    counts = np.arange(max_experts(summaries) + 1)
    shares = {
        p: as_table([summaries[name]["histogram"] for name in linears.of(p)], 0, len(counts)).mean(axis=0)
        for p in linears.projections
    }
    used = np.flatnonzero(np.sum(list(shares.values()), axis=0))
    first, last = min(int(used[0]), 1), int(used[-1])
    figure, axes = style.panels(len(shares), 2.7, sharex=True, sharey=True)
    for index, ((projection, share), ax) in enumerate(zip(shares.items(), axes, strict=True)):
        ax.bar(counts, 100 * share, width=0.85, color=style.line_style(index)["color"])
        mean = float(share @ counts)
        outline = withStroke(linewidth=3, foreground="white")
        ax.axvline(mean, color="#000000", linewidth=1.2, linestyle="--", path_effects=[outline])
        ax.set_title(f"{projection}  (mean {mean:.2f})")
        ax.set_xlabel("active experts")
        ax.grid(False, axis="x")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_xlim(first - 0.6, max(last, first + 1) + 0.6)
    for ax in axes[::4]:
        ax.set_ylabel("share of tokens, %")
    return figure


def load_map(linears: Linears, summaries: Summaries) -> Figure:
    """Draw each expert's load relative to an even share as a heat map per projection, and mark dead experts.

    The load is the expert's share of the active (token, expert) pairs of its linear.
    """
    grids = {p: load_grid(linears, summaries, p) for p in linears.projections}
    with np.errstate(divide="ignore"):
        # The even share is 1 / E. E can differ between linears: the rows of linears with fewer experts are padded with
        # NaN.
        ratios = {p: np.log2(grid * np.isfinite(grid).sum(axis=1, keepdims=True)) for p, grid in grids.items()}
    limit = style.log2_limit(ratios.values(), 0.25, 3)
    height = float(np.clip(1.1 + 0.13 * len(linears.layers), 2.4, 7))
    figure, axes = style.panels(len(grids), height, sharey=True)
    for (projection, grid), ax in zip(grids.items(), axes, strict=True):
        image = style.heat_map(ax, ratios[projection], norm=CenteredNorm(0, limit), cmap=style.DIVERGING, aspect="auto")
        y, x = np.nonzero(grid == 0)
        ax.plot(x, y, "x", color="#000000", markersize=6, markeredgewidth=1.5)
        ax.set_title(projection)
        ax.set_xlabel("expert")
        style.layer_ticks(ax.yaxis, linears)
        style.expert_ticks(ax.xaxis, grid.shape[1])
    for ax in axes[::4]:
        ax.set_ylabel("layer")
    style.log2_colorbar(figure, axes, image, limit, "load relative to an even share")
    return figure


def load_grid(linears: Linears, summaries: Summaries, projection: str) -> np.ndarray:
    """Return the loads of a projection's experts, (layers, experts); NaN if the linear or the expert does not exist."""
    names = [linears.name(projection, layer) for layer in linears.layers]
    rows = [[] if name is None else summaries[name]["load"] for name in names]
    return as_table(rows, np.nan, max_experts(summaries))
