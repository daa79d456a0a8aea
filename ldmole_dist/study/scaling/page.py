"""The study's page: one HTML file that needs nothing else. Every figure in its sentences is taken from the rows."""

from __future__ import annotations

from ldmole_dist.io import atomic_write, write_errors
from ldmole_dist.report import html
from ldmole_dist.study.scaling.sections import ALL
from ldmole_dist.study.scaling.sheet import Page
from ldmole_dist.study.scaling.store import Store
from ldmole_dist.study.scaling.study import Study

TITLE = "How LD-MoLE training scales on one machine"


def write_page(store: Store) -> list[str]:
    """Write `scaling.html`, and its plots beside it, into the folder of a study.

    Returns:
        Lines to print: the model's errors, and where the page is.

    Raises:
        UserError: where no cell was measured, or the folder cannot be written to.
    """
    study = Study(store)
    page = Page()
    for section in ALL:
        section(study, page)
    path = store.folder / "scaling.html"
    lead = f"{len(study.points)} configurations on {study.machine['device']}, {study.machine['processor']}."
    footer = "Written by ldmole scaling from cells.csv beside this page."
    with write_errors(f"the page in {store.folder}"):
        for figure in page.figures:
            atomic_write(store.folder / f"{figure.name}.png", figure.png)
        atomic_write(path, html.page(TITLE, lead, page.sections, footer))
    prediction = study.prediction
    said = [f"no model was fitted: {prediction}"] if isinstance(prediction, str) else prediction.lines()
    return [*said, f"page: {path}"]
