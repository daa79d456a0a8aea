"""Figures over the course of a run: how routing moved between its checkpoints, and what its own record says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ldmole_dist.method.statistics import summarize
from ldmole_dist.monitor.linears import Linears
from ldmole_dist.report.by_layer import has_lambda
from ldmole_dist.report.html import Figure
from ldmole_dist.report.movement import Movement
from ldmole_dist.report.style import (
    FROM_ZERO,
    MISSING,
    WIDTH,
    layer_ticks,
    line_style,
    map_axes,
    panels,
    png,
    styled,
)


def movement_map(linears: Linears, movement: Movement) -> Figure:
    """Share of tokens whose experts changed from one state to the next, by linear."""
    states, width = movement.states, len(linears.projections)
    moves = list(zip(states[:-1], states[1:], strict=True))
    grids = [
        np.stack([linears.values(p, now.changed.__getitem__) for p in linears.projections], axis=1) for _, now in moves
    ]
    columns = -(-len(moves) // -(-len(moves) // 6))  # rows of like length, of at most 6
    height = float(np.clip(2.0 + 0.09 * len(linears.layers), 2.7, 5.5))
    with styled():
        figure, axes = panels(len(moves), height, columns, sharey=True)
        for (before, now), grid, ax in zip(moves, grids, axes, strict=True):
            image = ax.imshow(100 * grid, vmin=0, vmax=100, cmap=FROM_ZERO, aspect="auto", interpolation="nearest")
            ax.set_facecolor(MISSING)
            ax.set_title(f"{before.label} → {now.label}: {100 * np.nanmean(grid):.0f} %")
            ax.set_xticks(range(width), linears.projections, rotation=90)
            layer_ticks(ax.yaxis, linears)
            map_axes(ax)
        for ax in axes[::columns]:
            ax.set_ylabel("layer")
        figure.colorbar(image, ax=axes, fraction=0.03, aspect=30).set_label("share of tokens, %")
        return Figure(
            "movement",
            "How routing moved between checkpoints",
            f"Share (in %) of {movement.tokens:,} fixed tokens of the data whose set of active experts is not the same before "
            "and after: one expert more, less or another counts. One panel from each saved step to the next, with the mean "
            f"over all linears in its title. {_states_said(movement)} Bright late panels are routers that have not settled.",
            png(figure),
        )


def movement_lines(linears: Linears, movement: Movement) -> Figure:
    """What is left to the final routing, lambda and experts per token, at each state."""
    states = movement.states
    summaries = [{name: summarize(sums) for name, sums in state.sums.items()} for state in states]
    drawn: list[tuple[str, Callable[[int, str], float]]] = [
        ("tokens routed otherwise than at the end, %", lambda i, name: 100 * states[i].to_final[name]),
        ("active experts per token", lambda i, name: summaries[i][name]["experts_per_token"]),
    ]
    if has_lambda(summaries[0]):
        drawn.append(("λ", lambda i, name: summaries[i][name]["lambda_mean"]))
    with styled():
        figure, axes = panels(len(drawn), 4.2, columns=len(drawn))
        for (label, value), ax in zip(drawn, axes, strict=True):
            for index, projection in enumerate(linears.projections):
                names = linears.of(projection)
                means = [np.mean([value(i, name) for name in names]) for i in range(len(states))]
                ax.plot(range(len(states)), means, label=projection, **line_style(index))
            ax.set_xticks(range(len(states)), [state.label for state in states], rotation=45 if len(states) > 6 else 0)
            ax.set_xlabel("optimizer step")
            ax.set_title(label)
        axes[0].set_ylim(bottom=0)
        _legend(figure, axes, linears)
        return Figure(
            "movement_lines",
            "Routing at the checkpoints",
            "Means over the layers of each projection and over the same tokens as above: the share of tokens whose set of "
            "active experts is not yet that of the final adapter, active experts per token, and λ where "
            "there is one, which is the same for projections that read the same tensor. The steps stand at equal distances, "
            "whatever lies between them.",
            png(figure),
        )


def curves(linears: Linears, lines: Sequence[Mapping[str, Any]]) -> Figure:
    """What the run recorded while it trained (routing.jsonl)."""
    drawn: list[tuple[str, str, Callable[[Sequence[float]], Any]]] = [
        ("experts_per_token", "active experts per token, mean", np.mean),
        ("lambda_mean", "λ, mean", np.mean),
        ("max_load", "largest load, times the even share, mean", np.mean),
        ("dead_experts", "experts without a token, number", np.sum),
    ]
    steps = [line["step"] for line in lines]
    recorded = set.intersection(*(set(line["linears"]) for line in lines))
    if not has_lambda(lines[0]["linears"]):
        drawn = [entry for entry in drawn if entry[0] != "lambda_mean"]
    with styled():
        figure, axes = panels(len(drawn), 3.4, columns=2, sharex=True)
        for (key, label, over_layers), ax in zip(drawn, axes, strict=True):
            for index, projection in enumerate(linears.projections):
                names = [name for name in linears.of(projection) if name in recorded]
                values = [over_layers([line["linears"][name][key] for name in names]) for line in lines if names]
                style = line_style(index) if len(steps) <= 40 else line_style(index) | {"marker": None}
                ax.plot(steps[: len(values)], values, label=projection, **style)
            ax.set_title(label)
        for ax in axes[2:]:
            ax.set_xlabel("optimizer step")
        _legend(figure, axes, linears)
        return Figure(
            "curves",
            "Routing while training",
            "What the run itself recorded of the tokens that it was training on (routing.jsonl), over the layers of each "
            "projection: mean active experts per token, mean λ where there is one, the load of each linear's "
            "busiest expert as a multiple of the even share (1 is balance), and the number of experts that no token of "
            "the recorded steps used.",
            png(figure),
        )


def _legend(figure: Any, axes: Sequence[Any], linears: Linears) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    figure.set_size_inches(WIDTH, figure.get_figheight() + 0.4)
    figure.legend(handles, labels, loc="outside upper center", ncols=min(7, len(linears.projections)))


def _states_said(movement: Movement) -> str:
    labels = [state.label for state in movement.states]
    said = "Step 0 is the adapter's initial values, drawn again from its seed. " if labels[0] == "0" else ""
    said += (
        "“final” is the adapter that the run ended with."
        if labels[-1] == "final"
        else "The last is the final adapter's."
    )
    if movement.left_out:
        said += f" {movement.left_out} checkpoints between these are left out."
    return said
