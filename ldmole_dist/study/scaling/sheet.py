"""A page that is written from top to bottom, section by section."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure as Drawing

from ldmole_dist.report import html


class Page:
    """What sections are written on."""

    def __init__(self) -> None:
        self.sections: list[html.Section] = []
        self.figures: list[html.Figure] = []
        self._parts: list[str | html.Points | html.Figure | html.Table] = []

    def heading(self, text: str) -> None:
        """Of a section; what follows is below it."""
        self._parts = []
        self.sections.append(html.Section(text, self._parts))

    def text(self, *sentences: str) -> None:
        """A paragraph."""
        self._parts.append(" ".join(sentence for sentence in sentences if sentence))

    def points(self, sentences: Sequence[str]) -> None:
        """A list of sentences."""
        self._parts.append(html.Points(sentences))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns with their units in the head."""
        self._parts.append(html.Table(head, [[str(value) for value in row] for row in rows]))

    def figure(self, drawing: Drawing, says: str) -> None:
        """A plot; `says` is what it shows, in a few words."""
        png = io.BytesIO()
        drawing.savefig(png, format="png", dpi=110)
        figure = html.Figure(says.replace(" ", "_"), says[:1].upper() + says[1:], "", png.getvalue())
        self._parts.append(figure)
        self.figures.append(figure)
