"""Routing by the domain of the data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ldmole_dist.method.statistics import added, summarize
from ldmole_dist.monitor.linears import Linears
from ldmole_dist.report.by_layer import spread
from ldmole_dist.report.html import Figure, Table
from ldmole_dist.report.style import WIDTH, layer_ticks, line_style, panels, png, styled

ByDomain = Mapping[str, Mapping[str, Tensor]]  # domain -> linear -> `statistics.routing_sums`


def domain_figure(linears: Linears, by_domain: ByDomain) -> Figure:
    """Experts per token and lambda by layer, a line for each domain."""
    layers = {
        layer: [name for p in linears.projections if (name := linears.name(p, layer)) is not None]
        for layer in linears.layers
    }
    x = np.arange(len(layers))
    found = {
        domain: [summarize(added(sums[name] for name in names)) for names in layers.values()]
        for domain, sums in by_domain.items()
    }
    drawn = {"experts_per_token": "active experts per token", "lambda_mean": "λ"}
    if not all("lambda_mean" in summary for summaries in found.values() for summary in summaries):
        del drawn["lambda_mean"]
    with styled():
        figure, axes = panels(len(drawn), 4.2, columns=len(drawn))
        for (key, title), ax in zip(drawn.items(), axes, strict=True):
            for index, (domain, summaries) in enumerate(found.items()):
                ax.plot(x, [summary[key] for summary in summaries], label=domain, **line_style(index))
            ax.set_title(title)
            ax.set_xlabel("layer")
            layer_ticks(ax.xaxis, linears, most=16)
        handles, labels = axes[0].get_legend_handles_labels()
        rows = -(-len(labels) // 6)
        figure.set_size_inches(WIDTH, figure.get_figheight() + 0.3 * rows)
        figure.legend(handles, labels, loc="outside upper center", ncols=6, title="domain")
        return Figure(
            "domains",
            "Routing by domain",
            "Mean active experts per token, and mean λ where there is one, over all tokens of a domain and all linears of a "
            "layer. Lines that part are layers whose routers tell the domains from each other; the vertical axes do not begin "
            "at 0.",
            png(figure),
        )


def domain_table(linears: Linears, by_domain: ByDomain, rows: Mapping[str, int]) -> Table:
    """Numbers of each domain.

    Args:
        linears: of the model.
        by_domain: sums.
        rows: of each domain.
    """
    cells = []
    for domain, sums in by_domain.items():
        whole = summarize(added(sums.values()))
        tokens = summarize(next(iter(sums.values())))["tokens"]
        by_projection = [
            summarize(added(sums[name] for name in linears.of(p)))["experts_per_token"] for p in linears.projections
        ]
        cells.append(
            [
                domain,
                f"{rows[domain]:,}",
                f"{tokens:,}",
                spread(whole) if "lambda_mean" in whole else "–",
                f"{whole['experts_per_token']:.2f}",
                *(f"{value:.2f}" for value in by_projection),
            ]
        )
    return Table(
        ["domain", "rows", "tokens", "λ (± std)", "experts per token", *linears.projections],
        cells,
        "Mean λ, and mean active experts per token: over all linears, then by projection.",
    )
