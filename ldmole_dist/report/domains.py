"""Draw a figure and a table of the routing by domain."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ldmole_dist.method.statistics import merge_sums, summarize
from ldmole_dist.monitor.linears import Linears
from ldmole_dist.report.by_layer import has_lambda
from ldmole_dist.report.html import Table
from ldmole_dist.report.style import layer_ticks, legend_above, panels, plot_lines

ByDomain = Mapping[str, Mapping[str, Tensor]]  # domain -> name of a linear -> `statistics.routing_sums`


def domain_figure(linears: Linears, by_domain: ByDomain) -> Figure:
    """Plot experts per token and, if the router has one, lambda by layer, with one line per domain."""
    layers = [[name for p in linears.projections if (name := linears.name(p, layer))] for layer in linears.layers]
    summaries = {
        domain: [summarize(merge_sums(sums[name] for name in names)) for names in layers]
        for domain, sums in by_domain.items()
    }
    quantities = {"experts_per_token": "active experts per token"}
    if all("lambda_mean" in summary for by_layer in summaries.values() for summary in by_layer):
        quantities["lambda_mean"] = "λ"
    figure, axes = panels(len(quantities), 4.2, columns=len(quantities))
    for (key, title), ax in zip(quantities.items(), axes, strict=True):
        lines = {domain: [summary[key] for summary in by_layer] for domain, by_layer in summaries.items()}
        plot_lines(ax, title, np.arange(len(layers)), lines)
        ax.set_xlabel("layer")
        layer_ticks(ax.xaxis, linears, most=16)
    legend_above(figure, axes[0], title="domain")
    return figure


def domain_table(linears: Linears, by_domain: ByDomain, rows: Mapping[str, int]) -> Table:
    """Return a table with one row per domain.

    Args:
        linears: Adapted linears of the model.
        by_domain: Routing of each domain, from `Observed.by_domain`.
        rows: Domain -> number of data rows.
    """
    cells = []
    for domain, sums in by_domain.items():
        total = summarize(merge_sums(sums.values()))
        tokens = summarize(next(iter(sums.values())))["tokens"]
        lam = f"{total['lambda_mean']:.3f} ± {total['lambda_std']:.3f}" if has_lambda({domain: total}) else "–"
        groups = [list(sums.values()), *([sums[name] for name in linears.of(p)] for p in linears.projections)]
        experts = [f"{summarize(merge_sums(group))['experts_per_token']:.2f}" for group in groups]
        cells.append([domain, f"{rows[domain]:,}", f"{tokens:,}", lam, *experts])
    header = ["domain", "rows", "tokens", "λ (± std)", "experts per token", *linears.projections]
    caption = "Mean λ over all linears; mean active experts per token over all linears, and for each projection."
    return Table(header, cells, caption)
