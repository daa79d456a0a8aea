"""The study's page: one HTML file that needs nothing else. Every figure in its sentences is taken from the rows."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from ldmole_dist.study.scaling.sections import ALL
from ldmole_dist.study.scaling.store import Store
from ldmole_dist.study.scaling.study import Study

TITLE = "How LD-MoLE training scales on one machine"
STYLE = """body{font:16px/1.55 system-ui,sans-serif;color:#1a202c;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1,h2{line-height:1.25}h2{margin-top:2.6rem;border-bottom:1px solid #cbd5e0}figure{margin:1.2rem 0}img{max-width:100%}
table{border-collapse:collapse;font-size:.85em;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e2e8f0}td{white-space:nowrap}
th{background:#f7fafc;vertical-align:bottom}th:first-child,td:first-child{text-align:left}"""


class Page:
    """HTML that is written from top to bottom."""

    def __init__(self, title: str) -> None:
        self.title, self.parts = title, [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Of a section."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, *sentences: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{html.escape(' '.join(sentences))}</p>")

    def points(self, sentences: Sequence[str]) -> None:
        """A list of sentences."""
        self.parts.append("<ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in sentences) + "</ul>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns with their units in the head."""
        lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
        lines += ["".join(f"<td>{html.escape(str(value))}</td>" for value in row) for row in rows]
        self.parts.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")

    def figure(self, figure: Figure, says: str) -> None:
        """A plot; `says` is what it shows, for those who do not see it."""
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
        data = base64.b64encode(png.getvalue()).decode()
        alt = html.escape(says, quote=True)
        self.parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>')

    def whole(self) -> str:
        """The file."""
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{STYLE}</style>'
        body = "\n".join(self.parts)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def write_page(store: Store) -> list[str]:
    """Write `scaling.html` into the folder of a study.

    Returns:
        Lines to print: the model's errors, and where the page is.

    Raises:
        UserError: where no cell was measured.
    """
    study = Study(store)
    page = Page(TITLE)
    for section in ALL:
        section(study, page)
    path = store.folder / "scaling.html"
    path.write_text(page.whole())
    prediction = study.prediction
    return [*([prediction] if isinstance(prediction, str) else prediction.lines()), f"page: {path}"]
