"""Two tasks of GLUE as sequence classification with a trained score head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldmole_dist.config import TASK_CLASSES
from ldmole_dist.data.formats import text_of
from ldmole_dist.data.rows import Row
from ldmole_dist.data.tasks.task import Task, number_of


@dataclass(frozen=True)
class GlueTask(Task):
    """One or two texts and a class.

    Args:
        columns: of the texts, which are read one after the other.
    """

    columns: tuple[str, ...] = ("sentence",)

    def row(self, record: Mapping[str, Any], where: str) -> Row:
        """See `Task`."""
        assert self.labels is not None
        texts = [text_of(record, column, where) for column in self.columns]
        return Row("\n".join(texts), self.labels[number_of(record, "label", len(self.labels), where)], where)


GLUE = (
    GlueTask("cola", ("nyu-mll/glue", "cola"), max_length=512, labels=TASK_CLASSES["cola"]),
    GlueTask(
        "rte",
        ("nyu-mll/glue", "rte"),
        max_length=512,
        labels=TASK_CLASSES["rte"],
        columns=("sentence1", "sentence2"),
    ),
)
