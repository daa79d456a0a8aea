"""Figures by layer and projection: lambda, experts per token, and how the load is spread over experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure as Drawing
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ldmole_dist.monitor.linears import Linears, as_table
from ldmole_dist.report.html import Figure
from ldmole_dist.report.style import (
    AROUND_A_CENTRE,
    GREY,
    MISSING,
    WIDTH,
    expert_ticks,
    layer_ticks,
    line_style,
    log2_limit,
    map_axes,
    panels,
    png,
    styled,
)

Summaries = Mapping[str, Mapping[str, Any]]  # linear -> `statistics.summarize`


def has_lambda(of: Summaries) -> bool:
    """Whether the router has one."""
    return all("lambda_mean" in summary for summary in of.values())


def spread(summary: Mapping[str, Any]) -> str:
    """Mean and standard deviation of lambda, in words."""
    return f"{summary['lambda_mean']:.3f} ± {summary['lambda_std']:.3f}"


def lambda_by_layer(linears: Linears, of: Summaries) -> Figure:
    """Mean and standard deviation of lambda."""
    means = {p: linears.values(p, lambda n: of[n]["lambda_mean"]) for p in linears.projections}
    stds = {p: linears.values(p, lambda n: of[n]["lambda_std"]) for p in linears.projections}
    # Projections that read the same tensor have the same lambda: one panel for them.
    same: dict[bytes, list[str]] = {}
    for projection in linears.projections:
        same.setdefault(means[projection].tobytes(), []).append(projection)
    groups = list(same.values())
    with styled():
        figure, axes = panels(len(groups), 3.2, sharex=True, sharey=True)
        x = np.arange(len(linears.layers))
        for group, ax in zip(groups, axes, strict=True):
            mean, std = means[group[0]], stds[group[0]]
            style = line_style(linears.projections.index(group[0]))
            ax.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.22, linewidth=0)
            if len(x) == 1:  # a band has no width there
                ax.errorbar(x, mean, std, color=style["color"], capsize=6)
            ax.plot(x, mean, **style)
            ax.set_title(", ".join(group))
            layer_ticks(ax.xaxis, linears, most=8)
            ax.set_xlabel("layer")
        axes[0].set_ylabel("λ")
        joined = len(groups) < len(linears.projections)
        shared = (
            " Projections in one panel have the same λ everywhere, as those have that read the same tensor."
            if joined
            else ""
        )
        return Figure(
            "lambda_by_layer",
            "λ by layer",
            "Mean of λ over all tokens (line) ± one standard deviation over tokens (band), by layer. λ has no unit and is "
            "below 0.99 (a band may reach above). It decides how sharp the mixture is: towards 1 one expert, at 0 sparsemax of "
            f"the router's scores, the lower the more experts with the more equal weights.{shared}",
            png(figure),
        )


def experts_by_layer(linears: Linears, of: Summaries) -> Figure:
    """Mean number of active experts."""
    experts = _experts(of)
    with styled():
        figure = Drawing(figsize=(WIDTH, 4.6), layout="constrained")
        ax = figure.subplots()
        x = np.arange(len(linears.layers))
        for index, projection in enumerate(linears.projections):
            ax.plot(
                x,
                linears.values(projection, lambda n: of[n]["experts_per_token"]),
                label=projection,
                **line_style(index),
            )
        means = [summary["experts_per_token"] for summary in of.values()]
        top = max(means)
        if top > experts / 2:
            alike = all(len(summary["load"]) == experts for summary in of.values())
            label = f"all {experts} experts" if alike else f"{experts} experts, the most there are"
            ax.axhline(experts, color=GREY, linewidth=1, linestyle="--", label=label)
            top = experts
        ax.set_ylim(min(1.0, *means) - 0.03 * top, 1.04 * top)
        ax.set_xlabel("layer")
        ax.set_ylabel("active experts per token")
        layer_ticks(ax.xaxis, linears, most=20)
        figure.legend(loc="outside right upper", title="projection", alignment="left")
        return Figure(
            "experts_by_layer",
            "Experts per token by layer",
            f"Mean over all tokens of the number of active experts (weight above 0), of {counts_said(of)}, by layer and "
            "projection. "
            "A high line is a linear that mixes many experts for each token; a line near 1 is one that picks.",
            png(figure),
        )


def experts_histogram(linears: Linears, of: Summaries) -> Figure:
    """Distribution of the number of active experts, by projection."""
    experts = _experts(of)
    with styled():
        figure, axes = panels(len(linears.projections), 2.7, sharex=True, sharey=True)
        numbers = np.arange(experts + 1)
        shares = {
            p: as_table([of[name]["histogram"] for name in linears.of(p)], 0, experts + 1).mean(axis=0)
            for p in linears.projections
        }
        some = np.flatnonzero(np.sum(list(shares.values()), axis=0))
        first, last = min(int(some[0]), 1), int(some[-1])
        for index, (projection, ax) in enumerate(zip(linears.projections, axes, strict=True)):
            share = shares[projection]
            ax.bar(numbers, 100 * share, width=0.85, color=line_style(index)["color"])
            mean = float(share @ numbers)
            outline = withStroke(linewidth=3, foreground="white")
            ax.axvline(mean, color="#000000", linewidth=1.2, linestyle="--", path_effects=[outline])
            ax.set_title(f"{projection}  (mean {mean:.2f})")
            ax.set_xlabel("active experts")
            ax.grid(False, axis="x")
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            ax.set_xlim(first - 0.6, max(last, first + 1) + 0.6)
        for ax in axes[::4]:
            ax.set_ylabel("share of tokens, %")
        return Figure(
            "experts_histogram",
            "Distribution of experts per token",
            "Share of tokens (in %, all layers of a projection together) that use so many experts, up to the most that any "
            "token uses; the dashed line is the mean. A single tall bar is a router that takes a fixed number whatever the "
            "token, a wide shape one that decides by token.",
            png(figure),
        )


def load_map(linears: Linears, of: Summaries) -> Figure:
    """Each expert's share of the active (token, expert) pairs of its linear."""
    experts, layers = _experts(of), len(linears.layers)
    grids = {p: _load_grid(linears, of, p, experts) for p in linears.projections}
    dead = sum(int((grid == 0).sum()) for grid in grids.values())
    with np.errstate(divide="ignore"):
        # Times the even share of the linear, which has as many experts as its row has numbers.
        ratios = {p: np.log2(grid * np.isfinite(grid).sum(axis=1, keepdims=True)) for p, grid in grids.items()}
    limit = log2_limit(np.concatenate([r.ravel() for r in ratios.values()]), 0.25, 3)
    with styled():
        figure, axes = panels(len(ratios), float(np.clip(1.1 + 0.13 * layers, 2.4, 7)), sharey=True)
        for projection, ax in zip(linears.projections, axes, strict=True):
            image = ax.imshow(
                np.ma.masked_invalid(ratios[projection]),
                norm=CenteredNorm(0, limit),
                cmap=AROUND_A_CENTRE,
                aspect="auto",
                interpolation="nearest",
            )
            y, x = np.nonzero(grids[projection] == 0)
            ax.plot(x, y, "x", color="#000000", markersize=6, markeredgewidth=1.5)
            ax.set_facecolor(MISSING)
            ax.set_title(projection)
            ax.set_xlabel("expert")
            layer_ticks(ax.yaxis, linears)
            expert_ticks(ax.xaxis, experts)
            map_axes(ax)
        for ax in axes[::4]:
            ax.set_ylabel("layer")
        bar = figure.colorbar(image, ax=axes, fraction=0.03, aspect=30)
        ticks = np.linspace(-limit, limit, 5)
        bar.set_ticks(list(ticks), labels=[f"{2**t:.3g}" for t in ticks])
        bar.set_label("share of active pairs, times the even share")
        return Figure(
            "load",
            "Load of the experts",
            "Each expert's share of the active (token, expert) pairs of its linear, one row a layer, as a multiple of the even "
            f"share, 1 of {counts_said(of)}, on a logarithmic scale. White is even; orange experts are used more, purple ones "
            "less. "
            + (
                f"× marks the {dead} experts that no token used. "
                if dead
                else "No expert is dead: each has some token. "
            )
            + "The numbers of experts are names only: expert 3 of one linear has nothing to do with expert 3 of another.",
            png(figure),
        )


def _load_grid(linears: Linears, of: Summaries, projection: str, experts: int) -> np.ndarray:
    """(layers, experts); no number where the projection has no linear, or the linear fewer experts."""
    names = [linears.name(projection, layer) for layer in linears.layers]
    return as_table([[] if name is None else of[name]["load"] for name in names], np.nan, experts)


def counts_said(of: Summaries) -> str:
    """How many experts the linears have, in words."""
    counts = {len(summary["load"]) for summary in of.values()}
    return f"{max(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)} (by layer)"


def _experts(of: Summaries) -> int:
    """The most that a linear has."""
    return max(len(summary["load"]) for summary in of.values())
