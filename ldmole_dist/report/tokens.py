"""Plot experts per token against token frequency. Shapes: V vocabulary size, N tokens shown."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from ldmole_dist.report.collect import Observed
from ldmole_dist.report.style import DPI, GREY, PALETTE, WIDTH

MAX_TOKENS = 200
LABELED = 14  # maximum number of tokens to label in each group: most frequent, most experts, fewest experts
KINDS = {  # kind of a token -> color and marker
    "begins a word": (PALETTE[0], "o"),
    "continues a word": (PALETTE[4], "^"),
    "punctuation, digits": (PALETTE[2], "s"),
    "special, white space": (PALETTE[3], "D"),
}


class TokenUse(NamedTuple):
    """The most frequent tokens of a data set.

    Args:
        ids_N: (N,), token ids, most frequent first.
        counts_N: (N,), number of occurrences in the data.
        experts_N: (N,), number of active experts, averaged over occurrences and linears.
        mean_experts: Number of active experts, averaged over all tokens of the data and over linears.
    """

    ids_N: np.ndarray
    counts_N: np.ndarray
    experts_N: np.ndarray
    mean_experts: float


def most_frequent(observed: Observed) -> TokenUse:
    """Return the `MAX_TOKENS` most frequent tokens, or fewer if the data contains fewer distinct tokens."""
    counts_V, active_V, linears = observed.tokens_V.numpy(), observed.active_V.numpy(), len(observed.together)
    ids_N = np.argsort(-counts_V, kind="stable")[:MAX_TOKENS]
    ids_N = ids_N[counts_V[ids_N] > 0]
    counts_N = counts_V[ids_N]
    overall = active_V.sum() / max(counts_V.sum(), 1) / linears
    return TokenUse(ids_N, counts_N, active_V[ids_N] / counts_N / linears, float(overall))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Spearman's rank correlation of x and y; None if one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def tokens_figure(use: TokenUse, tokenizer: PreTrainedTokenizerBase) -> Figure:
    """Plot experts per token against frequency, and label frequent tokens and those with the most or fewest experts."""
    texts = [token_text(tokenizer, int(token)) for token in use.ids_N]
    kinds_N = np.array([kind_of(tokenizer, int(token), text) for token, text in zip(use.ids_N, texts, strict=True)])
    figure = Figure(figsize=(WIDTH, 6.6), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    for kind, (color, marker) in KINDS.items():
        if (chosen_N := kinds_N == kind).any():
            x, y, label = use.counts_N[chosen_N], use.experts_N[chosen_N], f"{kind} ({chosen_N.sum()})"
            ax.scatter(x, y, s=26, color=color, marker=marker, alpha=0.75, label=label, linewidths=0)
    mean = f"mean of all tokens, {use.mean_experts:.2f}"
    ax.axhline(use.mean_experts, color=GREY, linestyle="--", linewidth=1.2, label=mean)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.06, y=0.08)
    ax.set_xlabel("occurrences in the data")
    ax.set_ylabel("active experts per token, mean over linears")
    figure.legend(loc="outside upper left", ncols=5)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # drawing computes the layout; labels are placed in pixels, which depend on it
    _label(ax, use, texts, canvas.get_renderer())
    return figure


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token for a plot.

    Spaces, line breaks and tabs are replaced by visible characters, and characters that the font lacks by their escape
    sequences. A token that is part of a multi-byte character is written as "#" and the token id.
    """
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = " " + piece[1:] if piece.startswith("▁") else str(tokenizer.decode([token]))
    if "\N{REPLACEMENT CHARACTER}" in text:  # the token is a part of a multi-byte character
        return f"#{token}"
    text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "→")
    return "".join(c if ord(c) in _drawable() else f"\\u{ord(c):04x}" for c in text)


def kind_of(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> str:
    """Return the kind of a token, a key of `KINDS`.

    A token with letters begins a word if it starts with a space or if its first visible character is an upper-case letter.

    Args:
        tokenizer: Tokenizer of the model.
        token: Token id.
        text: Result of `token_text` for this token.
    """
    letters = text.lstrip("␣⏎→")
    if token in tokenizer.all_special_ids or not letters:
        return "special, white space"
    if not any(unicodedata.category(c).startswith("L") for c in letters):
        return "punctuation, digits"
    return "begins a word" if text.startswith("␣") or letters[:1].isupper() else "continues a word"


@cache
def _drawable() -> Any:
    """Return a dict whose keys are the code points that the font of the figures contains."""
    return font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()


def _label(ax: Axes, use: TokenUse, texts: Sequence[str], renderer: Any) -> None:
    """Label the most frequent tokens and those with the most or fewest experts.

    A token has no label if, at every offset in `_OFFSETS`, it would cover a data point or another label or leave the axes.
    """
    by_experts = np.argsort(use.experts_N, kind="stable")
    by_count = np.argsort(-use.counts_N, kind="stable")
    turns = itertools.islice(zip(by_count, by_experts[::-1], by_experts, strict=True), LABELED)
    points = ax.transData.transform(np.column_stack([use.counts_N, use.experts_N]))
    placed: list[Bbox] = []
    frame = ax.get_window_extent()
    for i in dict.fromkeys(int(token) for turn in turns for token in turn):
        for dx, dy in _OFFSETS:
            label = ax.annotate(
                texts[i],
                (use.counts_N[i], use.experts_N[i]),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx else "center",
                va="bottom" if dy > 0 else "top" if dy else "center",
                fontsize=9,
                parse_math=False,
            )
            box = label.get_window_extent(renderer)
            covers_point = ((points > box.min) & (points < box.max)).all(axis=1).any()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not covers_point and not box.count_overlaps(placed):
                placed.append(box)
                break
            label.remove()


# Offsets of a label from its data point, in typographic points, in the order in which they are tried.
_OFFSETS = [(5, 0), (-5, 0), (0, 5), (0, -5), (4, 4), (4, -4), (-4, 4), (-4, -4)]
