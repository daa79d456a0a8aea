"""Draw figures over the course of a run: routing at its checkpoints, and the routing recorded during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ldmole_dist.method.statistics import summarize
from ldmole_dist.monitor.linears import Linears
from ldmole_dist.report.by_layer import has_lambda
from ldmole_dist.report.history import RoutingHistory
from ldmole_dist.report.style import SEQUENTIAL, heat_map, layer_ticks, legend_above, panels, plot_lines


def change_map(linears: Linears, history: RoutingHistory) -> Figure:
    """Draw, for each linear, the percentage of tokens whose support changed from each state to the next."""
    pairs = list(zip(history.states[:-1], history.states[1:], strict=True))
    columns = -(-len(pairs) // -(-len(pairs) // 6))  # at most 6 panels per row, in rows of similar length
    height = float(np.clip(2.0 + 0.09 * len(linears.layers), 2.7, 5.5))
    figure, axes = panels(len(pairs), height, columns, sharey=True)
    for (previous, state), ax in zip(pairs, axes, strict=True):
        grid = 100 * np.stack([linears.values(p, state.changed.__getitem__) for p in linears.projections], axis=1)
        image = heat_map(ax, grid, vmin=0, vmax=100, cmap=SEQUENTIAL, aspect="auto")
        ax.set_title(f"{previous.label} → {state.label}: {np.nanmean(grid):.0f} %")
        ax.set_xticks(range(len(linears.projections)), linears.projections, rotation=90)
        layer_ticks(ax.yaxis, linears)
    for ax in axes[::columns]:
        ax.set_ylabel("layer")
    figure.colorbar(image, ax=axes, fraction=0.03, aspect=30).set_label("share of tokens, %")
    return figure


def state_lines(linears: Linears, history: RoutingHistory) -> Figure:
    """Plot the difference from the final routing, experts per token and lambda at each state, one line per projection.

    There is no panel for lambda if the router has none.
    """
    states = history.states
    summaries = [{name: summarize(sums) for name, sums in state.sums.items()} for state in states]
    quantities: dict[str, Callable[[int, str], float]] = {
        "tokens whose support differs from the final one, %": lambda i, name: 100 * states[i].to_final[name],
        "active experts per token": lambda i, name: summaries[i][name]["experts_per_token"],
    }
    if has_lambda(summaries[0]):
        quantities["λ"] = lambda i, name: summaries[i][name]["lambda_mean"]
    x = range(len(states))
    figure, axes = panels(len(quantities), 4.2, columns=len(quantities))
    for (title, value), ax in zip(quantities.items(), axes, strict=True):
        lines = {
            p: [float(np.mean([value(i, name) for name in linears.of(p)])) for i in x] for p in linears.projections
        }
        plot_lines(ax, title, x, lines)
        ax.set_xticks(x, [state.label for state in states], rotation=45 if len(states) > 6 else 0)
        ax.set_xlabel("optimizer step")
    axes[0].set_ylim(bottom=0)
    legend_above(figure, axes[0])
    return figure


def training_lines(linears: Linears, records: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the routing recorded during training, one line per projection over the linears that all records contain.

    Args:
        linears: Adapted linears of the model.
        records: Result of `read_routing_log`, at least one record.
    """
    quantities: dict[str, tuple[str, Callable[[Sequence[float]], Any]]] = {
        "experts_per_token": ("active experts per token, mean", np.mean),
        "lambda_mean": ("λ, mean", np.mean),
        "max_load": ("largest load relative to an even share, mean", np.mean),
        "dead_experts": ("experts without a token", np.sum),
    }
    if not has_lambda(records[0]["linears"]):
        del quantities["lambda_mean"]
    steps = [record["step"] for record in records]
    recorded = set.intersection(*(set(record["linears"]) for record in records))
    names = {p: [name for name in linears.of(p) if name in recorded] for p in linears.projections}
    figure, axes = panels(len(quantities), 3.4, columns=2, sharex=True)
    for (key, (title, reduce)), ax in zip(quantities.items(), axes, strict=True):
        lines = {
            p: [reduce([record["linears"][name][key] for name in of_projection]) for record in records if of_projection]
            for p, of_projection in names.items()
        }
        plot_lines(ax, title, steps, lines)
    for ax in axes[2:]:
        ax.set_xlabel("optimizer step")
    legend_above(figure, axes[0])
    return figure
