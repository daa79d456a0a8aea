"""From what a config names as data to rows: files, tasks, data sets of the hub, and mixtures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ldmole_dist.config import Source
from ldmole_dist.data.formats import FORMATS, Format, recognised
from ldmole_dist.data.records import Located, read_records
from ldmole_dist.data.rows import Row
from ldmole_dist.data.tasks import TASKS
from ldmole_dist.data.tasks.choice import ChoiceTask
from ldmole_dist.data.tasks.task import Task
from ldmole_dist.errors import UserError


def sources_of(data: str | Sequence[Source]) -> list[Source]:
    """What `data.train` or `data.eval` names; a path alone is one source."""
    return [Source(path=data)] if isinstance(data, str) else list(data)


def read_rows(
    data: str | Sequence[Source],
    task: str,
    labels: Sequence[str] | None,
    limit: int | None = None,
    split: str = "train",
) -> list[list[Row]]:
    """All rows, source by source.

    Args:
        data: of the config.
        task: "causal_lm" or "sequence_classification".
        labels: if given, every target must be one of them, unless its row has choices of its own.
        limit: read so many rows of each source only.
        split: "train" or "eval": of data sets of the hub that have several.

    Raises:
        UserError: naming file and line, where a row is not as it should be; naming the source, where there is none.
    """
    sources = sources_of(data)
    by_source = []
    for source in sources:
        maker = RowMaker(source, task, labels, named=len(sources) > 1)
        rows = [maker(record, where) for record, where in islice(_records(source, split), limit)]
        if not rows:
            raise UserError(f"data file {source.path or source.task} holds no rows")
        by_source.append(rows)
    return by_source


class RowMaker:
    """Makes rows of one source's records, and checks them.

    Args:
        source: of the config.
        task: "causal_lm" or "sequence_classification".
        labels: if given, every target must be one of them, unless its row has choices of its own.
        named: rows that name no domain have the source's name.

    Raises:
        UserError: where the source does not go with the task.
    """

    def __init__(self, source: Source, task: str, labels: Sequence[str] | None, named: bool) -> None:
        self.task, self.labels = task, labels
        self.name = source.name or (source.task or Path(source.path or "").stem if named else None)
        self._format: Format | None = None
        if source.task is not None:
            known: Task = TASKS[source.task]
            if known.model_task != task:
                raise UserError(
                    f"task {known.name} is for backbone.task={known.model_task}, this run has backbone.task={task}: change one"
                )
            self._format = known.worded if isinstance(known, ChoiceTask) and source.answers == "text" else known.row
        elif source.format is not None:
            self._format = FORMATS[source.format]
            if (source.format == "classification") != (task == "sequence_classification"):
                raise UserError(f"format {source.format} does not go with backbone.task={task}: change one of them")

    def __call__(self, record: Mapping[str, Any], where: str) -> Row:
        """The first record decides the format, where neither task nor config does.

        Raises:
            UserError: naming `where`, the reason and the remedy.
        """
        if self._format is None:
            self._format = FORMATS[recognised(record, where, self.task)]
        row = self._format(record, where)
        if self.labels is not None and row.choices is None and row.target not in self.labels:
            raise UserError(
                f"{row.where}: {row.target!r} is none of data.labels {list(self.labels)}: correct the row or add the label"
            )
        return row if row.domain is not None or self.name is None else replace(row, domain=self.name)


def _records(source: Source, split: str) -> Iterator[Located]:
    if source.path is not None:
        return read_records(source.path)
    assert source.task is not None  # the config's check says that there is one of them
    return _from_hub(TASKS[source.task], source.split, split)


def _from_hub(task: Task, split: str | None, default: str) -> Iterator[Located]:
    import datasets  # and pandas with it: a fifth of what a process takes to start, and most runs read files

    path, config = task.hub
    name = split or task.splits[default]
    try:
        data: Any = datasets.load_dataset(path, config, split=task.hub_split or name)
    except Exception as error:  # of many kinds: no network, no such data set, a hub that refuses
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"task {task.name}: {path} cannot be loaded from the hub ({reason}): give its rows as a file, "
            f"[{{task: {task.name}, path: FILE}}] with a .jsonl, .parquet or .csv of the same columns"
        ) from error
    if task.hub_split is not None:
        data = task.part(data, name)
    for number, record in enumerate(data, start=1):
        yield record, f"{path} {name}, row {number}"
