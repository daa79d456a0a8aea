"""Experts per token against how frequent the token is.

Shapes: V vocabulary, N tokens shown.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from ldmole_dist.report.collect import Observed
from ldmole_dist.report.html import Figure
from ldmole_dist.report.style import DPI, GREY, PALETTE, WIDTH, png, styled

MOST = 200  # commonest tokens that are shown
LABELLED = 14  # of each: the commonest, those with most and those with fewest experts
KINDS = {
    "begins a word": (PALETTE[0], "o"),
    "goes on in a word": (PALETTE[4], "^"),
    "punctuation, digits": (PALETTE[2], "s"),
    "special, white space": (PALETTE[3], "D"),
}


def tokens_figure(observed: Observed, tokenizer: PreTrainedTokenizerBase) -> Figure:
    """Experts per token of the commonest tokens.

    Args:
        observed: of the data.
        tokenizer: that decodes them.
    """
    counts_V, active_V = observed.tokens_V.numpy(), observed.active_V.numpy()
    ids_N = np.argsort(-counts_V, kind="stable")[:MOST]
    ids_N = ids_N[counts_V[ids_N] > 0]
    linears = len(observed.together)
    x_N, y_N = counts_V[ids_N], active_V[ids_N] / counts_V[ids_N] / linears
    overall = active_V.sum() / max(counts_V.sum(), 1) / linears
    texts = [token_text(tokenizer, int(token)) for token in ids_N]
    kinds = [kind_of(tokenizer, int(token), text) for token, text in zip(ids_N, texts, strict=True)]
    rank, said = rank_correlation(x_N, y_N), ""
    if rank is not None:
        said = (
            f" The rank correlation (Spearman's) of frequency and experts among them is {rank:+.2f}: below 0, frequent "
            "tokens use fewer experts; near 0, frequency does not matter."
        )
    with styled():
        figure = Drawing(figsize=(WIDTH, 6.6), dpi=DPI, layout="constrained")
        ax = figure.subplots()
        for kind, (colour, marker) in KINDS.items():
            of_kind = np.array([k == kind for k in kinds])
            if of_kind.any():
                label = f"{kind} ({of_kind.sum()})"
                ax.scatter(
                    x_N[of_kind], y_N[of_kind], s=26, color=colour, marker=marker, alpha=0.75, label=label, linewidths=0
                )
        ax.axhline(overall, color=GREY, linestyle="--", linewidth=1.2, label=f"mean of all tokens, {overall:.2f}")
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(x=0.06, y=0.08)
        ax.set_xlabel("occurrences in the data (logarithmic)")
        ax.set_ylabel("active experts per token, mean over linears")
        figure.legend(loc="outside upper left", ncols=5)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # labels are placed in pixels, which the layout decides
        _label(ax, x_N, y_N, texts, canvas.get_renderer())
        return Figure(
            "tokens",
            "Experts per token and token frequency",
            f"The {len(ids_N)} commonest tokens of the data: how often each is there, and how many experts it uses in the mean "
            f"over its occurrences and over all {linears} linears. Labelled are the commonest and the most extreme, as far as "
            f"there is room; ␣ is a space, ⏎ a line break.{said}",
            png(figure),
        )


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as it is read, with white space and characters that cannot be drawn made visible."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = " " + piece[1:] if piece.startswith("▁") else str(tokenizer.decode([token]))
    if "\N{REPLACEMENT CHARACTER}" in text:  # some bytes of a character
        return f"#{token}"
    text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "→")
    return "".join(c if ord(c) in _drawable() else f"\\u{ord(c):04x}" for c in text)


def kind_of(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> str:
    """One of `KINDS`."""
    letters = text.lstrip("␣⏎→")
    if token in tokenizer.all_special_ids or not letters:
        return "special, white space"
    if not any(unicodedata.category(c).startswith("L") for c in letters):
        return "punctuation, digits"
    return "begins a word" if text.startswith("␣") or letters[:1].isupper() else "goes on in a word"


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's; None where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def _drawable() -> Any:
    return font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()


def _label(ax: Axes, x_N: np.ndarray, y_N: np.ndarray, texts: Sequence[str], renderer: Any) -> None:
    """Label the most telling tokens where no other label and no point is in the way."""
    by_experts = np.argsort(y_N, kind="stable")
    turns = zip(np.argsort(-x_N, kind="stable"), by_experts[::-1], by_experts, strict=True)
    wanted = list(dict.fromkeys(int(i) for turn in list(turns)[:LABELLED] for i in turn))
    points = ax.transData.transform(np.column_stack([x_N, y_N]))
    taken: list[Bbox] = []
    inside = ax.get_window_extent()
    for i in wanted:
        for dx, dy, ha, va in _OFFSETS:
            label = ax.annotate(
                texts[i],
                (x_N[i], y_N[i]),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=9,
                parse_math=False,
            )
            box = label.get_window_extent(renderer)
            hidden = ((points > box.min) & (points < box.max)).all(axis=1).any()
            within = box.x0 >= inside.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0 and box.y1 <= inside.y1
            if within and not hidden and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


_OFFSETS = [
    (5, 0, "left", "center"),
    (-5, 0, "right", "center"),
    (0, 5, "center", "bottom"),
    (0, -5, "center", "top"),
    (4, 4, "left", "bottom"),
    (4, -4, "left", "top"),
    (-4, 4, "right", "bottom"),
    (-4, -4, "right", "top"),
]
