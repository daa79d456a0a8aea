"""Co-activation: how often two experts of a linear are active for the same token. Shapes: E experts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from torch import Tensor

from ldmole_dist.monitor.linears import Linears
from ldmole_dist.report.style import DIVERGING, expert_ticks, heat_map, log2_colorbar, log2_limit, panels

# A lift is shown only if at least this number of joint tokens is expected, the usual minimum for a chi-squared test.
MIN_EXPECTED = 5.0


def lift(together_EE: np.ndarray, tokens: int) -> np.ndarray:
    """Return the joint frequency of each pair of experts divided by the frequency expected under independence.

    Args:
        together_EE: (E, E), number of tokens for which both experts are active; on the diagonal, number of tokens for
            which that expert is active.
        tokens: Total number of tokens.

    Returns:
        (E, E), NaN on the diagonal and where fewer than `MIN_EXPECTED` joint tokens are expected.
    """
    active_E = np.diag(together_EE)
    expected_EE = np.outer(active_E, active_E) / max(tokens, 1)
    enough_EE = (expected_EE >= MIN_EXPECTED) & ~np.eye(len(active_E), dtype=bool)
    return np.divide(together_EE, expected_EE, out=np.full(expected_EE.shape, np.nan), where=enough_EE)


def coactivation(linears: Linears, together: Mapping[str, Tensor], tokens: int) -> Figure | None:
    """Draw the lift of every pair of experts of each linear in the first, middle and last layer of the model.

    With up to 10 experts, the diagonal shows the percentage of tokens for which each expert is active. Linears outside the
    numbered layers are drawn only if there are no numbered layers.

    Args:
        linears: Adapted linears of the model.
        together: Name of a linear -> (E, E) joint counts, see `lift`.
        tokens: Total number of tokens.

    Returns:
        The figure; None if no linear has more than one expert.
    """
    experts = max(map(len, together.values()))
    if experts == 1:
        return None
    numbered = [layer for layer in linears.layers if layer is not None] or linears.layers
    layers = dict.fromkeys([numbered[0], numbered[(len(numbered) - 1) // 2], numbered[-1]])
    shown = [(layer, p, name) for layer in layers for p in linears.projections if (name := linears.name(p, layer))]
    counts = {name: together[name].numpy() for _, _, name in shown}
    with np.errstate(divide="ignore"):
        maps = {name: np.log2(lift(count, tokens)) for name, count in counts.items()}
    limit = log2_limit(maps.values(), 0.5, 3)
    columns = len(linears.projections) if len(linears.projections) > 2 else len(shown)
    figure, axes = panels(len(shown), 2.15 if columns > 4 else 3.2, columns=columns)
    for (layer, projection, name), ax in zip(shown, axes, strict=True):
        # The lift of a pair that never occurs is -inf, which would be masked. Clip it to the end of the color scale.
        values = np.clip(maps[name], -limit, limit)
        image = heat_map(ax, values, norm=CenteredNorm(0, limit), cmap=DIVERGING)
        if experts <= 10:
            for expert, share in enumerate(100 * np.diag(counts[name]) / max(tokens, 1)):
                size = 6 if columns > 4 else 9
                ax.text(expert, expert, f"{share:.0f}", ha="center", va="center", fontsize=size, color="#333333")
        ax.set_title(projection if layer is None else f"{projection}\nlayer {layer}", fontsize=10)
        for axis in (ax.xaxis, ax.yaxis):
            expert_ticks(axis, len(values), most=4 if experts > 10 else 10)
    log2_colorbar(figure, axes, image, limit, "lift")
    figure.supxlabel("expert", fontsize=11)
    figure.supylabel("expert", fontsize=11)
    return figure
