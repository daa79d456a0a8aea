"""Which experts are active together.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import CenteredNorm
from torch import Tensor

from ldmole_dist.monitor.linears import Linears
from ldmole_dist.report.html import Figure
from ldmole_dist.report.style import (
    AROUND_A_CENTRE,
    MISSING,
    expert_ticks,
    log2_limit,
    map_axes,
    panels,
    png,
    styled,
)

FEWEST = 5.0  # tokens expected to have both, below which a ratio says nothing


def lift(together_EE: np.ndarray, tokens: int) -> np.ndarray:
    """How often two experts are active together, against what their own frequencies would give by chance.

    Args:
        together_EE: tokens in which both are active; on the diagonal, in which the one is.
        tokens: in all.

    Returns:
        (E, E); no number on the diagonal, and where fewer than `FEWEST` tokens would have both by chance.
    """
    active_E = np.diag(together_EE)
    expected_EE = np.outer(active_E, active_E) / max(tokens, 1)
    tells_EE = (expected_EE >= FEWEST) & ~np.eye(len(active_E), dtype=bool)
    return np.divide(together_EE, expected_EE, out=np.full(expected_EE.shape, np.nan), where=tells_EE)


def coactivation(linears: Linears, together: Mapping[str, Tensor], tokens: int) -> Figure | None:
    """Lift of every pair of experts, for the first, the middle and the last layer of every projection.

    Args:
        linears: of the model.
        together: linear -> (E, E), see `lift`.
        tokens: in all.

    Returns:
        None for a single expert, which is with none.
    """
    experts = max(map(len, together.values()))
    if experts == 1:
        return None
    numbered = [layer for layer in linears.layers if layer is not None] or linears.layers
    layers = list(dict.fromkeys([numbered[0], numbered[(len(numbered) - 1) // 2], numbered[-1]]))
    places = [(layer, p, linears.name(p, layer)) for layer in layers for p in linears.projections]
    shown = [(layer, p, name) for layer, p, name in places if name is not None]
    maps, active = {}, {}
    for _, _, name in shown:
        counts = together[name].numpy()
        with np.errstate(divide="ignore"):
            maps[name] = np.log2(lift(counts, tokens))
        active[name] = 100 * np.diag(counts) / max(tokens, 1)
    limit = log2_limit(np.concatenate([m.ravel() for m in maps.values()]), 0.5, 3)
    columns = len(linears.projections) if len(linears.projections) > 2 else len(shown)
    with styled():
        figure, axes = panels(len(shown), 2.15 if columns > 4 else 3.2, columns=columns)
        for (layer, projection, name), ax in zip(shown, axes, strict=True):
            # Never together is the far end of the scale, not a gap.
            values = np.clip(maps[name], -limit, limit)
            image = ax.imshow(values, norm=CenteredNorm(0, limit), cmap=AROUND_A_CENTRE, interpolation="nearest")
            ax.set_facecolor(MISSING)
            if experts <= 10:
                for expert, share in enumerate(active[name]):
                    size = 6 if columns > 4 else 9
                    ax.text(expert, expert, f"{share:.0f}", ha="center", va="center", fontsize=size, color="#333333")
            ax.set_title(projection if layer is None else f"{projection}\nlayer {layer}", fontsize=10)
            for axis in (ax.xaxis, ax.yaxis):
                expert_ticks(axis, len(values), most=4 if experts > 10 else 10)
            map_axes(ax)
        bar = figure.colorbar(image, ax=axes, fraction=0.025, aspect=30)
        ticks = np.linspace(-limit, limit, 5)
        bar.set_ticks(list(ticks), labels=[f"{2**t:.2g}" for t in ticks])
        bar.set_label("together, times as often as by chance")
        figure.supxlabel("expert", fontsize=11)
        figure.supylabel("expert", fontsize=11)
        return Figure(
            "coactivation",
            "Experts that are active together",
            "For each pair of experts of one linear: tokens in which both are active, divided by what their own frequencies "
            "would give if they were independent (lift; logarithmic scale). White is chance, orange a pair that goes together, "
            "purple a pair that excludes each other; grey is an expert with itself, or a pair too rare to tell. "
            + (
                "Numbers on the diagonal: share of tokens, in %, in which the expert is active. "
                if experts <= 10
                else ""
            )
            + "First, middle and last layer only, and no mean over layers: the numbers of experts are names that mean "
            "something else in every linear, so that maps of different layers cannot be added up.",
            png(figure),
        )
