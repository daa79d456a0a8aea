"""Format tables as Markdown with aligned columns, readable in a terminal and in a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Rows = Sequence[Mapping[str, object]]


def text_of(value: object) -> str:
    """Return the text of a table cell.

    Integers get thousands separators, and so do floats of at least 1,000 in absolute value, which are rounded to integers.
    Smaller floats get four significant digits. Other values are converted with `str`.
    """
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown_table(rows: Rows) -> str:
    """Return a Markdown table with aligned columns.

    Args:
        rows: at least one row; the keys of the first row are the columns, and every row must have them.
    """
    lines = [list(rows[0]), *([text_of(row[key]) for key in rows[0]] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
