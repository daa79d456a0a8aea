"""GLUE tasks as sequence classification with a trained score head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldmole_dist.config import TASK_CLASSES
from ldmole_dist.data.formats import get_text
from ldmole_dist.data.rows import Row
from ldmole_dist.data.tasks.task import Task, get_class_index


@dataclass(frozen=True)
class GlueTask(Task):
    """GLUE task, whose records hold one or two texts and a class index.

    Args:
        columns: names of the text columns; the texts are joined by a line break.
    """

    columns: tuple[str, ...] = ("sentence",)

    def row(self, record: Mapping[str, Any], where: str) -> Row:
        """Return the row of a record; see `Task.row`."""
        assert self.labels is not None
        texts = [get_text(record, column, where) for column in self.columns]
        return Row("\n".join(texts), self.labels[get_class_index(record, "label", len(self.labels), where)], where)


GLUE = (
    GlueTask("cola", ("nyu-mll/glue", "cola"), labels=TASK_CLASSES["cola"]),
    GlueTask(
        "rte",
        ("nyu-mll/glue", "rte"),
        labels=TASK_CLASSES["rte"],
        columns=("sentence1", "sentence2"),
    ),
)
