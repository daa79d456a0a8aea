"""Build self-contained HTML pages from text, tables and figures; images are embedded in the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Figure:
    """An image with its caption.

    Args:
        name: File name without extension; also the id of the HTML element.
        title: Short title, shown at the start of the caption.
        caption: Plain text that says what is plotted, in which units, and how to read it.
        png: Contents of the PNG file.
    """

    name: str
    title: str
    caption: str
    png: bytes

    def html(self) -> str:
        """Return the `<figure>` element; the style sheet numbers the captions."""
        data = base64.b64encode(self.png).decode()
        title = escape(self.title)
        return (
            f'<figure id="{escape(self.name)}"><img alt="{title}" src="data:image/png;base64,{data}">'
            f"<figcaption><b>{title}.</b> {escape(self.caption)}</figcaption></figure>"
        )


@dataclass(frozen=True)
class Table:
    """A table of plain text.

    Args:
        header: Column titles; empty for a two-column table of names and values.
        rows: Cells of each row. If there is a header, columns whose cells all start with a digit, sign or dash are
            right-aligned.
        caption: Plain text above the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def html(self) -> str:
        """Return the `<table>` element inside a horizontally scrollable `<div>`."""
        columns = zip(*self.rows, strict=True)
        numeric = [
            bool(self.header) and all(cell[:1] in set("0123456789−-+–") for cell in column) for column in columns
        ]
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        head = f"<thead>{_row(self.header, numeric, header=True)}</thead>" if self.header else ""
        body = "".join(_row(row, numeric) for row in self.rows)
        return f'<div class="wide"><table>{caption}{head}<tbody>{body}</tbody></table></div>'


def _row(cells: Sequence[str], numeric: Sequence[bool], header: bool = False) -> str:
    html = ""
    for column, cell in enumerate(cells):
        tag = "th" if header or column == 0 else "td"
        kind = ' class="number"' if column < len(numeric) and numeric[column] else ""
        html += f"<{tag}{kind}>{escape(cell)}</{tag}>"
    return f"<tr>{html}</tr>"


@dataclass(frozen=True)
class Points:
    """A bulleted list of plain text."""

    sentences: Sequence[str]

    def html(self) -> str:
        """Return the `<ul>` element."""
        return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in self.sentences) + "</ul>"


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Args:
        title: Heading.
        parts: Content in order; a string becomes a paragraph of plain text.
    """

    title: str
    parts: Sequence[str | Points | Figure | Table]


def page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """Return an HTML document with a navigation bar and numbered figures.

    Args:
        title: Title of the page.
        lead: One sentence below the title.
        sections: Content of the page, in order.
        footer: Text of the last line.
    """
    links, body = [], []
    for i, section in enumerate(sections):
        links.append(f'<a href="#section{i}">{escape(section.title)}</a>')
        parts = (f"<p>{escape(part)}</p>" if isinstance(part, str) else part.html() for part in section.parts)
        body += [f'<section id="section{i}"><h2>{escape(section.title)}</h2>', *parts, "</section>"]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), lead=escape(lead), nav=" ".join(links), body="\n".join(body), footer=escape(footer)
    )
