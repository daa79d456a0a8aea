"""One self-contained HTML page of sections with figures and tables: nothing of it is loaded from anywhere else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1a1a1a;
  background: #fff; max-width: 1160px; margin: 0 auto; padding: 24px 28px 64px; }
h1 { font-size: 28px; margin: 8px 0 4px; }
h2 { font-size: 21px; margin: 44px 0 8px; padding-top: 12px; border-top: 1px solid #ddd; }
p, ul { max-width: 860px; }
.lead { color: #555; margin-top: 0; }
nav { margin: 16px 0; font-size: 15px; }
nav a { margin-right: 18px; white-space: nowrap; }
a { color: #005a8c; }
figure { margin: 16px 0 28px; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 860px; color: #333; font-size: 15px; margin-top: 8px; }
figcaption b { color: #111; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; margin: 12px 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #333; padding-bottom: 6px; max-width: 860px; }
th, td { padding: 5px 14px 5px 6px; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; }
footer { margin-top: 48px; color: #666; font-size: 14px; border-top: 1px solid #ddd; padding-top: 12px; }
@media print { nav { display: none; } figure, table { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Figure:
    """A picture with its caption.

    Args:
        name: of its file, without ".png".
        title: in a few words; begins the caption.
        caption: what is shown, in which units, and how to read it; plain text.
        png: the picture.
    """

    name: str
    title: str
    caption: str
    png: bytes

    def html(self, number: int) -> str:
        """As an element."""
        data = base64.b64encode(self.png).decode()
        return (
            f'<figure id="{escape(self.name)}"><img alt="{escape(self.title)}" src="data:image/png;base64,{data}">'
            f"<figcaption><b>Figure {number}. {escape(self.title)}.</b> {escape(self.caption)}</figcaption></figure>"
        )


@dataclass(frozen=True)
class Table:
    """Cells of plain text.

    Args:
        header: of the columns; empty for a table of names and values.
        rows: each as long as the header; a cell that begins with a digit or a sign is set to the right.
        caption: plain text.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def html(self) -> str:
        """As an element."""
        numbers = [
            bool(self.header) and all(row[i][:1].isdigit() or row[i][:1] in "−-+–" for row in self.rows)
            for i in range(len(self.rows[0]) if self.rows else len(self.header))
        ]

        def line(tags: Sequence[str], cells: Sequence[str]) -> str:
            marked = zip(tags, numbers, cells, strict=True)
            of_class = [(tag, ' class="number"' if number else "", escape(cell)) for tag, number, cell in marked]
            return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for tag, kind, cell in of_class) + "</tr>"

        width = len(numbers)
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        head = f"<thead>{line(['th'] * width, self.header)}</thead>" if self.header else ""
        body = "".join(line(["th", *["td"] * (width - 1)], row) for row in self.rows)
        return f'<div class="wide"><table>{caption}{head}<tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Points:
    """A list of sentences of plain text."""

    sentences: Sequence[str]

    def html(self) -> str:
        """As an element."""
        return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in self.sentences) + "</ul>"


@dataclass(frozen=True)
class Section:
    """A heading and what is below it: paragraphs of plain text, lists, figures, tables."""

    title: str
    parts: Sequence[str | Points | Figure | Table]


def page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """The whole document.

    Args:
        title: of the page.
        lead: one sentence below it.
        sections: in order; figures are numbered through all of them.
        footer: the last line.

    Returns:
        HTML.
    """
    links = " ".join(f'<a href="#section{i}">{escape(s.title)}</a>' for i, s in enumerate(sections))
    out = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n<body>',
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n<nav>{links}</nav>',
    ]
    figures = 0
    for i, section in enumerate(sections):
        out.append(f'<section id="section{i}"><h2>{escape(section.title)}</h2>')
        for part in section.parts:
            if isinstance(part, Figure):
                figures += 1
                out.append(part.html(figures))
            else:
                out.append(f"<p>{escape(part)}</p>" if isinstance(part, str) else part.html())
        out.append("</section>")
    out.append(f"<footer>{escape(footer)}</footer>\n</body>\n</html>\n")
    return "\n".join(out)
